"""The `steer` command: one file a command."""
