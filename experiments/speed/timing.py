"""Shared by the benchmarks: programs timed in turns, and the provenance of rows.

Absolute times are noisy, so every figure is a ratio of two programs in one process, which take turns in a new order
each round. A ratio compares the times of one round; the median over rounds is reported.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import origin

FOLDER = Path(__file__).parent
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**34), "MALLOC_TRIM_THRESHOLD_": str(2**34)}


def keep_memory() -> None:
    """Restarts the script with an allocator that keeps freed memory.

    glibc would return buffers above 32 MB to the kernel after every call, and the page faults of the next one would be
    charged to whichever program comes next.
    """
    if not _ALLOCATOR.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | _ALLOCATOR)


def in_turns(calls: dict[str, Callable[[], Any]], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each call in each round, without the warm-up; calls must return only when their work is done."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    rng = np.random.default_rng(0)
    for _ in range(rounds + warmup):
        for name in rng.permutation(list(calls)):
            start = time.perf_counter()
            calls[name]()
            times[name].append(time.perf_counter() - start)
    return {name: values[warmup:] for name, values in times.items()}


def stepper(program: Callable, carry: tuple, *inputs: Any) -> Callable[[], None]:
    """A call that makes one step of `program(*carry, *inputs) -> (*carry, value)` and waits for it."""

    def call():
        nonlocal carry
        *carry, _ = program(*carry, *inputs)
        jax.block_until_ready(carry)

    return call


def ratio(times: dict[str, list[float]], name: str, base: str) -> float:
    """Median over rounds of the time of `name` in units of that of `base`."""
    return statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))


def provenance() -> dict:
    """The provenance of the rows of this script."""
    return origin.of(sys.argv[0], *sys.argv[1:])
