"""Examples that two sets have in common."""

import jax
import numpy as np

from eupmu_jax.tasks import Examples
from eupmu_jax.training._digest import numbers_of
from eupmu_jax.training._inputs import CHECKED


def shared(some, others):
    """How many of some examples are among others, or equal one of them; 0 if either is not in memory."""
    if not all(isinstance(part, Examples) for part in (some, others)):
        return 0
    # Byte sums are fast and rule out nearly all pairs; the rest are compared in full.
    sums = _sums(some), _sums(others)
    mine, theirs = (
        _rows(part, np.flatnonzero(np.isin(of_part, of_other)))
        for part, of_part, of_other in zip((some, others), sums, sums[::-1], strict=True)
    )
    theirs = set(theirs)
    return sum(row in theirs for row in mine)


def _sums(examples):
    found = []
    for start in range(0, len(examples), CHECKED):
        leaves = _leaves(examples[np.arange(start, min(start + CHECKED, len(examples)))])
        flat = [np.ascontiguousarray(leaf).reshape(len(leaf), -1).view(np.uint8) for leaf in leaves if np.size(leaf)]
        found.append(sum((part.sum(axis=1, dtype=np.int64) for part in flat), np.zeros(1, np.int64)))
    return np.concatenate(found)


def _rows(examples, positions):
    """The bytes of these examples."""
    leaves = _leaves(examples[positions])
    return [b"".join(leaf[row].tobytes() for leaf in leaves) for row in range(len(positions))]


def _leaves(batch):
    """Leaves on the host with JAX's dtypes, as one set may already be on a device and the other not."""
    leaves = [np.asarray(numbers_of(leaf)) for leaf in jax.tree.leaves(batch)]
    return [leaf.astype(jax.dtypes.canonicalize_dtype(leaf.dtype), copy=False) for leaf in leaves]
