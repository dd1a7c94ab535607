"""Signals that end a run after the current step."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


@contextlib.contextmanager
def stopping(directory: str | os.PathLike[str] | None) -> Iterator[tuple[list[int], Callable[[int], bool]]]:
    """Yields the signals received, and a function of the steps made: whether to stop, the same in all processes."""
    received: list[int] = []
    if directory is not None and jax.distributed.is_initialized():
        yield received, multihost_utils.reached_preemption_sync_point
        return
    # Only the main thread can handle signals in Python.
    if directory is None or threading.current_thread() is not threading.main_thread():
        yield received, lambda count: False
        return

    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    if previous[signal.SIGINT] in (signal.SIG_IGN, signal.SIG_DFL):
        # A process that ignores Ctrl-C, because others stop it, keeps ignoring it.
        del previous[signal.SIGINT]
    # None stands for a handler that was not installed by Python, which cannot be restored.
    previous = {number: handler for number, handler in previous.items() if handler is not None}

    def receive(number, frame):
        received.append(number)
        if signal.SIGINT in previous:
            # The second Ctrl-C ends the run at once.
            signal.signal(signal.SIGINT, previous[signal.SIGINT])

    for number in previous:
        signal.signal(number, receive)
    try:
        yield received, lambda count: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
