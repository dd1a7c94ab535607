"""How a command ends before its time: by a signal, or with input that is at fault."""

import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from typing import NoReturn

BAD_INPUT = 2


@contextlib.contextmanager
def on_signals() -> Iterator[None]:
    """Within it SIGTERM and SIGINT end the process, with a line on stderr."""
    handlers = {signal.SIGTERM: _terminated, signal.SIGINT: _interrupted}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupted(*_):
    end("interrupted; what was finished is kept where it was written, and the same command goes on from there", 130)


def _terminated(*_):
    end("terminated; what was finished is kept where it was written, and the same command goes on from there", 143)


def end(message: str, code: int) -> NoReturn:
    """Ends the process with a line on stderr."""
    # At once, and not by an exception: raised in a callback of the garbage collector, it would be dropped.
    show_cursor = "\x1b[?25h" if sys.stdout.isatty() else ""
    with contextlib.suppress(RuntimeError):  # the signal may have come within a write
        print(show_cursor, end="", flush=True)
        print(f"eupmu: {message}", file=sys.stderr, flush=True)
    for child in multiprocessing.active_children():
        child.kill()
    # Not by way of the interpreter's end, which XLA's threads at work may not survive.
    os._exit(code)


def fail(message: str) -> NoReturn:
    """Ends the command as its input is at fault, with one line on stderr."""
    print(f"eupmu: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(BAD_INPUT)
