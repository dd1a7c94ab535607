"""What was typed, for the record."""

import shlex
import sys


def command_line() -> str:
    """The command of this process, as one would type it."""
    return shlex.join(["eupmu", *sys.argv[1:]])
