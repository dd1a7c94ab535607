"""Runs several `eupmu` commands in one process: python many_commands.py "COMMAND ..." "COMMAND ..."."""

import sys

from eupmu_jax.commands import cli

if __name__ == "__main__":
    for command in sys.argv[1:]:
        sys.argv = ["eupmu", *command.split()]
        try:
            cli.main()
        except SystemExit as found:
            if found.code:
                raise
