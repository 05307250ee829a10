"""The `modularbase` command: one file a command group."""
