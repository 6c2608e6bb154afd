"""The experiment behind `flowstream demo`: does FLOW retain more at equal target, on two CPU cores, without a network?"""
