"""The command line: one file a command. Options are light to import; torch comes when a command runs."""
