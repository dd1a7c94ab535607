"""Ends a command early: on a signal, or because its input is invalid."""

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from typing import NoReturn

BAD_INPUT = 2


@contextlib.contextmanager
def on_signals() -> Iterator[None]:
    """A context in which SIGTERM and SIGINT end the process with one line on stderr."""
    handlers = {signal.SIGTERM: _terminated, signal.SIGINT: _interrupted}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """A context in which Orbax does not log, with tracebacks of its threads, the errors that it raises as well."""
    logger = logging.getLogger("absl")
    # Libraries of data sets and the user's own file may log through it too.
    is_other = lambda record: os.path.join("orbax", "checkpoint") not in record.pathname
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def _interrupted(*_):
    end("interrupted; finished work is kept where it was written, and the same command resumes from there", 130)


def _terminated(*_):
    end("terminated; finished work is kept where it was written, and the same command resumes from there", 143)


def end(message: str, code: int) -> NoReturn:
    """Ends the process with one line on stderr."""
    # Exits at once instead of raising: an exception in a callback of the garbage collector would be dropped.
    show_cursor = "\x1b[?25h" if sys.stdout.isatty() else ""
    for text, stream in ((show_cursor, sys.stdout), (f"eupmu: {message}\n", sys.stderr)):
        # The signal may have interrupted a write, and whoever reads the output may be gone.
        with contextlib.suppress(RuntimeError, OSError):
            print(text, end="", file=stream, flush=True)
    for child in multiprocessing.active_children():
        child.kill()
    # Skips the interpreter's shutdown, which may crash while XLA's threads are running.
    os._exit(code)


def fail(message: str) -> NoReturn:
    """Ends the command because of invalid input, with one line on stderr."""
    print(f"eupmu: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(BAD_INPUT)
