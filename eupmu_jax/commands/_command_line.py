"""The command line of this process, for provenance."""

import shlex
import sys


def command_line() -> str:
    """The command that started this process, as typed in a shell."""
    return shlex.join(["eupmu", *sys.argv[1:]])
