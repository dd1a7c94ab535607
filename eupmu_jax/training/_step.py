"""The compiled step of a run."""

import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from eupmu_jax import methods
from eupmu_jax.methods.method import Settings, Terms
from eupmu_jax.tasks import Task


@functools.lru_cache(maxsize=64)
def jitted_step(make: Callable, task: Task, terms: Terms, choices: tuple, gathers: bool) -> Callable:
    """The compiled step of a method, for any numbers; it takes batches or gathers them from arrays on the device."""

    def step(params, state, prepared, numbers, start, fed, count, epoch, draw_key, step_key):
        settings = methods.complete(dict(choices) | numbers)
        procedure = make(task, terms._replace(**start), settings)
        if gathers:
            trees, ids = fed
            batches = tuple(
                jax.tree.map(lambda leaf: leaf[part], tree)  # noqa: B023
                for tree, part in zip(trees, ids, strict=True)
            )
        else:
            batches = fed
            if task.draw is not None:
                keys = jax.random.split(jax.random.fold_in(draw_key, count))
                batches = tuple(task.draw(key, epoch, batch) for key, batch in zip(keys, batches, strict=True))
        return procedure.step(params, prepared, state, batches, count, jax.random.fold_in(step_key, count))

    return jax.jit(step, donate_argnums=(0, 1))


def together(tree: chex.ArrayTree) -> chex.ArrayTree:
    """The tree committed to the single device of its committed leaves, such as those of a checkpoint, if any.

    A step commits all its results as soon as one argument is committed, and would then be compiled again for them.
    """
    found = {leaf.sharding for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array) and leaf.committed}
    if len(found) != 1 or not isinstance(next(iter(found)), SingleDeviceSharding):
        return tree
    return jax.device_put(tree, found.pop())


def parted(settings: Settings) -> tuple[dict[str, chex.Array], tuple]:
    """Splits settings into numbers, which the compiled step takes, and choices, for which it is compiled."""
    numbers = {name: jnp.float32(value) for name, value in settings.items() if not isinstance(value, str)}
    return numbers, tuple(sorted((name, value) for name, value in settings.items() if isinstance(value, str)))
