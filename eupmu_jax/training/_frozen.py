"""The part of a model that is trained, as a task of its own."""

import functools

import jax
import jax.numpy as jnp

from eupmu_jax._stack import frozen as parts
from eupmu_jax._stack.programs import owner
from eupmu_jax.tasks import Task


def trainable(task: Task, params, frozen):
    """The task and parameters without what is frozen, and a function that puts that back as it was given."""
    if frozen is None:
        return task, params, lambda part: part
    mask = parts.mask_of(params, frozen)
    free, given = parts.split(mask, params)
    # JAX has no 64 bits by default: what is given back must not have gone through it.
    whole, restored = (
        functools.partial(parts.joined, fixed=fixed) for fixed in (jax.tree.map(jnp.asarray, given), given)
    )
    outputs, fresh, unknown = task.outputs, task.fresh_params, task.unknown
    task = task._replace(
        # Or the frozen arrays would stay with JAX after the run.
        outputs=owner(lambda part, batch, key: outputs(whole(part), batch, key)),
        unknown=None if unknown is None else lambda part, batch: unknown(whole(part), batch),
        fresh_params=None if fresh is None else lambda key: parts.split(mask, fresh(key))[0],
    )
    return task, free, restored
