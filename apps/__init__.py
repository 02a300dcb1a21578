"""The applications: the command line and its jobs."""
