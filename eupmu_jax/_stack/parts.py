"""Applies a function to many examples in parts, if all of them at once would not fit in memory."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from eupmu_jax._stack.jaxpr import equations

# The most that an array computed on one part may take.
LARGEST_BYTES = 2**28


def in_parts(apply: Callable, params: chex.ArrayTree, *examples: chex.Array) -> chex.Array:
    """`apply(params, *examples)`, an array, computed part by part if an array in it takes more than 256 MB.

    The parts are of equal size, the last one padded with the last example. The result is that of a single call, up to
    rounding, as long as `apply` treats each example independently.

    >>> in_parts(lambda scale, x: scale * x, 2.0, jnp.arange(3.0)).tolist()
    [0.0, 2.0, 4.0]
    """
    count = len(examples[0])
    parts = min(count, -(-_largest(apply, params, *examples) // LARGEST_BYTES))
    if parts <= 1:
        return apply(params, *examples)
    size = -(-count // parts)
    positions = jnp.minimum(jnp.arange(parts * size), count - 1).reshape(parts, size)
    found = jax.lax.map(lambda part: apply(params, *(leaf[part] for leaf in examples)), positions)
    return found.reshape(-1, *found.shape[2:])[:count]


def _largest(apply, *args):
    """Bytes of the largest array that is computed."""
    sizes = [_bytes_of(variable.aval) for equation, _ in equations(apply, *args) for variable in equation.outvars]
    return max(sizes, default=0)


def _bytes_of(aval):
    # The type of a key gives no size; no key is large.
    return getattr(aval, "size", 0) * getattr(getattr(aval, "dtype", None), "itemsize", 0)
