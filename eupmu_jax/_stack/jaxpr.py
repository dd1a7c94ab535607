"""What a traced function consists of, with loops counted as often as they run."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal


def equations(function: Callable, *args) -> Iterator[tuple[Any, int]]:
    """Every equation of `function(*args)`, down into calls, loops and branches, and how often it runs.

    A `scan` multiplies by its length. A `while_loop` counts as one iteration, and every branch of a `cond` counts.

    >>> import jax.numpy as jnp
    >>> nine_times = lambda x: jax.lax.scan(lambda y, _: (jnp.sin(y), None), x, length=9)
    >>> {equation.primitive.name: times for equation, times in equations(nine_times, 1.0)}["sin"]
    9
    """
    yield from _walk(jax.make_jaxpr(function)(*args), 1)


def constants(function: Callable, *args) -> list[Any]:
    """Arrays and numbers that `function(*args)` closes over, in the order of the program.

    >>> import jax.numpy as jnp
    >>> weights = jnp.ones(2)
    >>> [value.tolist() for value in constants(lambda x: x * weights + 3, jnp.zeros(2))]
    [[1.0, 1.0], 3.0]
    """
    closed = jax.make_jaxpr(function)(*args)
    found = list(closed.consts)
    for equation, _ in _walk(closed, 1):
        found += [variable.val for variable in equation.invars if isinstance(variable, Literal)]
        for value in equation.params.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                found += part.consts if isinstance(part, ClosedJaxpr) else []
    is_key = lambda value: jax.dtypes.issubdtype(getattr(value, "dtype", None), jax.dtypes.prng_key)
    return [np.asarray(jax.random.key_data(value) if is_key(value) else value) for value in found]


def matmul_flops(function: Callable, *args) -> int:
    """Floating point operations of the matrix products and convolutions of `function(*args)`: multiply and add are two.

    Everything else is counted as free. Recomputation in the backward pass (`jax.checkpoint`) is counted again.

    >>> import jax.numpy as jnp
    >>> matmul_flops(lambda a, b: jnp.tanh(a @ b), jnp.ones((8, 4)), jnp.ones((4, 2)))
    128
    """
    total = 0
    for equation, times in equations(function, *args):
        if equation.primitive.name not in ("dot_general", "conv_general_dilated"):
            continue
        out = math.prod(equation.outvars[0].aval.shape)
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += times * 2 * out * math.prod(shape[i] for i in contracted)
        else:
            kernel = equation.invars[1].aval.shape
            outputs = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
            total += times * 2 * out * math.prod(kernel) // outputs
    return total


def _walk(jaxpr, times):
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield equation, times
        turns = times * equation.params["length"] if equation.primitive.name == "scan" else times
        for value in equation.params.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                if isinstance(part, ClosedJaxpr | Jaxpr):
                    yield from _walk(part, turns)
