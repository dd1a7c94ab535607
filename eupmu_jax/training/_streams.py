"""Which examples each step sees."""

from collections.abc import Iterator, Sequence

import numpy as np

from eupmu_jax.training.levels import MOST


def id_batches(ids: np.ndarray, batch_size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Endless batches of ids, each pass over them in a new order; a batch may span two passes."""
    pending = np.empty(0, ids.dtype)
    while True:
        while len(pending) < batch_size:
            pending = np.concatenate([pending, rng.permutation(ids)])
        yield pending[:batch_size]
        pending = pending[batch_size:]


def paired_batches(
    counts: Sequence[int], sizes: Sequence[int], seed: int, start: int = 0
) -> Iterator[tuple[np.ndarray, ...]]:
    """Positions in the forget and the retain set for every step from `start` on, the same in every call."""
    rng = np.random.default_rng(seed)
    # The probe samples are drawn first.
    sample_positions(counts, rng)
    streams = [id_batches(np.arange(count), size, rng) for count, size in zip(counts, sizes, strict=True)]
    step = 0
    while True:
        positions = tuple(next(stream) for stream in streams)
        if step >= start:
            yield positions
        step += 1


def sample_positions(counts: Sequence[int], rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """At most 2,000 random positions in each set: the examples on which a run is measured."""
    return tuple(rng.permutation(np.arange(count))[:MOST] for count in counts)
