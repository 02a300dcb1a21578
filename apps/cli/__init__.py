"""The `steer` command: one file per command."""
