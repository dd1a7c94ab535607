"""Signals that end a run behind a step."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


@contextlib.contextmanager
def stopping(directory: str | os.PathLike[str] | None) -> Iterator[tuple[list[int], Callable[[int], bool]]]:
    """Signals that came, and a function of the steps made: whether to stop there, the same in all processes."""
    received: list[int] = []
    if directory is not None and jax.distributed.is_initialized():
        yield received, multihost_utils.reached_preemption_sync_point
        return
    # Python lets no other thread handle signals.
    if directory is None or threading.current_thread() is not threading.main_thread():
        yield received, lambda count: False
        return

    def receive(number, frame):
        received.append(number)
        # The second one ends it at once.
        signal.signal(signal.SIGINT, previous.get(signal.SIGINT, signal.getsignal(signal.SIGINT)))

    # Who handles Ctrl-C, or ignores it, still does.
    ours = [signal.SIGTERM] + [signal.SIGINT] * (signal.getsignal(signal.SIGINT) is signal.default_int_handler)
    previous = {number: signal.signal(number, receive) for number in ours}
    try:
        yield received, lambda count: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
