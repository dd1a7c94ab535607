"""Compiled functions of a task, kept for as long as the task may be used again."""

import functools
from collections.abc import Callable

import chex
import jax
import numpy as np
from jax.experimental import multihost_utils

_OWN = "_programs"


def owner(outputs: Callable) -> Callable:
    """Marks the function, so that what is compiled for a task with these outputs is freed along with them.

    For a task that is built anew in every run and may hold a large model: JAX keeps what it compiled for a static
    argument, and the argument itself, for the life of the process.
    """
    setattr(outputs, _OWN, {})
    return outputs


def jit_for_task(choices: int = 0) -> Callable[[Callable], Callable]:
    """`jax.jit` for a function whose first argument is a task, and whose next `choices` arguments are hashable.

    Equal tasks share their programs, except those of an `owner`.

    >>> from eupmu_jax.tasks import classification
    >>> shape = jit_for_task()(lambda task, inputs: task.outputs(2.0, {"inputs": inputs}, None))
    >>> float(shape(classification(lambda params, inputs: params * inputs, 3), 4.0))
    8.0
    """

    def wrap(function):
        shared = jax.jit(function, static_argnums=tuple(range(1 + choices)))

        @functools.wraps(function)
        def call(task, *given):
            own = getattr(task.outputs, _OWN, None)
            if own is None:
                return waited(shared(task, *given))
            chosen, arguments = given[:choices], given[choices:]
            key = function, task, *chosen
            if key not in own:
                own[key] = jax.jit(functools.partial(function, task, *chosen))
            return waited(own[key](*arguments))

        return call

    return wrap


def waited(result: chex.ArrayTree) -> chex.ArrayTree:
    """The result, ready before it is returned if one CPU simulates several devices.

    >>> float(waited(jax.jit(lambda x: 2 * x)(1.5)))
    3.0
    """
    if jax.default_backend() == "cpu" and jax.local_device_count() > 1:
        # Devices simulated by one CPU share a pool of threads. With 32 programs in flight, the start of the next one
        # takes the thread that the first one waits for.
        jax.block_until_ready(result)
    return result


def fetched(array: chex.Array) -> np.ndarray:
    """The whole array on the host; all processes that share it must call this, as its parts may lie on their devices.

    >>> fetched(jax.numpy.arange(3)).tolist()
    [0, 1, 2]
    """
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)
