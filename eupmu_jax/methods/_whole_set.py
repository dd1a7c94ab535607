"""Gradients over a whole set, in chunks that bound the memory, by compiled code that all runs share."""

import functools

import chex
import jax
import jax.numpy as jnp

from eupmu_jax.methods.method import Batch, retain_gradient

CHUNK = 500


def mean_gradient(apply, params: chex.ArrayTree, data: Batch) -> chex.ArrayTree:
    """The gradient of the mean cross-entropy over `data`, a dict of `images` and `labels`.

    One forward and backward pass over the set, called outside jit. Raises `ValueError` for an empty set.

    >>> apply = lambda w, images: images * w
    >>> data = {"images": jnp.ones((4, 2)), "labels": jnp.array([0, 0, 0, 1])}
    >>> mean_gradient(apply, jnp.zeros(2), data).tolist()
    [-0.25, 0.25]
    """
    count = len(data["labels"])
    if not count:
        raise ValueError("data: got an empty set, expected at least one example")
    total = jax.tree.map(jnp.zeros_like, params)
    for start in range(0, count, CHUNK):
        chunk = {name: data[name][start : start + CHUNK] for name in ("images", "labels")}
        total = _add(apply, params, chunk, len(chunk["labels"]) / count, total)
    return total


@functools.partial(jax.jit, static_argnums=0)
def _add(apply, params, chunk, share, total):
    gradient = retain_gradient(apply, params, chunk)
    return jax.tree.map(lambda g, t: t + share * g, gradient, total)
