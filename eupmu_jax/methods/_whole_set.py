"""Gradients over a whole set, in chunks that bound the memory, with compiled code that all runs share."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np

from eupmu_jax._stack.programs import jit_for_task
from eupmu_jax.methods.method import retain_gradient, size_of
from eupmu_jax.tasks import Examples, Task

CHUNK = 500


def mean_gradient(task: Task, params: chex.ArrayTree, data: Examples) -> chex.ArrayTree:
    """The gradient of the mean retain loss over `data`, whichever set it is.

    One forward and backward pass over the set, called outside jit. It is computed in chunks of 500 examples, weighted
    by their sizes: for a loss that is a mean over tokens, or draws noise, it is the mean over the chunks. Raises
    `ValueError` for an empty set.

    >>> from eupmu_jax.tasks import as_examples, classification
    >>> task = classification(lambda w, inputs: inputs * w, num_classes=2)
    >>> data = as_examples("data", {"inputs": jnp.ones((4, 2)), "labels": jnp.array([0, 0, 0, 1])})
    >>> mean_gradient(task, jnp.zeros(2), data).tolist()
    [-0.25, 0.25]
    """
    count = len(data)
    if not count:
        raise ValueError("data: got an empty set, expected at least one example")
    total = jax.tree.map(jnp.zeros_like, params)
    for start in range(0, count, CHUNK):
        chunk = data[np.arange(start, min(start + CHUNK, count))]
        total = _add(task, params, chunk, size_of(chunk) / count, total)
    return total


def largest_pass(task: Task, count: int) -> tuple[Callable, int]:
    """What `mean_gradient` does at once with `count` examples, as an entry of `Procedure.outside`."""
    return (lambda params, batch: _add(task, params, batch, 1.0, params)), min(CHUNK, count)


@jit_for_task()
def _add(task, params, chunk, share, total):
    gradient = retain_gradient(task, params, chunk)
    return jax.tree.map(lambda g, t: t + share * g, gradient, total)
