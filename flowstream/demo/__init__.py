"""The experiment behind `flowstream demo`: does FLOW retain more at equal target? Two cores, no network."""
