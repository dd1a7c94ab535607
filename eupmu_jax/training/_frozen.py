"""The part of a model that is trained, as a task of its own."""

import functools

import jax
import jax.numpy as jnp

from eupmu_jax._stack.programs import owner
from eupmu_jax.tasks import Task


def trainable(task: Task, params, frozen):
    """The task and parameters without what is frozen, and a function that puts that back as it was given."""
    if frozen is None:
        return task, params, lambda part: part
    if all(jax.tree.leaves(frozen)):
        raise ValueError("frozen: every leaf is frozen, expected at least one trainable leaf")
    flags, structure = jax.tree.leaves(frozen), jax.tree.structure(params)
    given = jax.tree.leaves(params)
    fixed = [jnp.asarray(leaf) if flag else None for flag, leaf in zip(flags, given, strict=True)]

    def beside(others, part):
        free = iter(jax.tree.leaves(part))
        leaves = [leaf if flag else next(free) for flag, leaf in zip(flags, others, strict=True)]
        return jax.tree.unflatten(structure, leaves)

    # JAX has no 64 bits by default: what is given back must not have gone through it.
    whole, restored = functools.partial(beside, fixed), functools.partial(beside, given)

    def without(tree):
        return [leaf for flag, leaf in zip(flags, jax.tree.leaves(tree), strict=True) if not flag]

    outputs, fresh, unknown = task.outputs, task.fresh_params, task.unknown
    task = task._replace(
        # Or the frozen arrays would stay with JAX after the run.
        outputs=owner(lambda part, batch, key: outputs(whole(part), batch, key)),
        unknown=None if unknown is None else lambda part, batch: unknown(whole(part), batch),
        fresh_params=None if fresh is None else lambda key: without(fresh(key)),
    )
    return task, without(params), restored
