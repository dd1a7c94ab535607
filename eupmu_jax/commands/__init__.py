"""The command `eupmu`."""
