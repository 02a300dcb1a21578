"""The `steer` command: one file per command, or per group of small ones."""
