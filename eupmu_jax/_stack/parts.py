"""A function of many examples in parts, where what it computes on all of them at once would not fit."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from eupmu_jax._stack.jaxpr import equations

# What the largest array that is computed on a part may take.
LARGEST_BYTES = 2**28


def in_parts(apply: Callable, params: chex.ArrayTree, *examples: chex.Array) -> chex.Array:
    """`apply(params, *examples)`, an array, part by part where an array in it takes more than 256 MB.

    The parts are equal, the last one filled up with the last example, and their results are what one call gives, up to
    rounding: `apply` has to treat each example by itself.

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
    """Bytes of the largest array that is computed on the way."""
    sizes = [_bytes_of(variable.aval) for equation, _ in equations(apply, *args) for variable in equation.outvars]
    return max(sizes, default=0)


def _bytes_of(aval):
    # Of a key the type tells no size; no key is large.
    return getattr(aval, "size", 0) * getattr(getattr(aval, "dtype", None), "itemsize", 0)
