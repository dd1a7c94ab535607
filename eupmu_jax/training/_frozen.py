"""The part of a model that is trained, as a task of its own."""

import functools

import jax
import jax.numpy as jnp

from eupmu_jax._stack import frozen as parts
from eupmu_jax._stack.checks import check_same_shapes
from eupmu_jax._stack.programs import owner
from eupmu_jax.tasks import Task


def trainable(task: Task, params, frozen):
    """The task and the parameters without frozen leaves, and a function that puts these back as they were given."""
    if frozen is None:
        return task, params, lambda part: part
    mask = parts.mask_of(params, frozen)
    free, given = parts.split(mask, params)
    # JAX has no 64-bit types by default, so what is returned must not have passed through it.
    whole, restored = (
        functools.partial(parts.joined, fixed=fixed) for fixed in (jax.tree.map(jnp.asarray, given), given)
    )
    outputs, fresh, unknown, check_model = task.outputs, task.fresh_params, task.unknown, task.check_model
    # No arrays, which the task would keep alive.
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), params)

    def free_of(untrained):
        check_same_shapes("task.fresh_params", untrained, "params", shapes)
        return parts.split(mask, untrained)[0]

    task = task._replace(
        # `owner` lets the frozen arrays be freed after the run, which JAX's caches would otherwise keep.
        outputs=owner(lambda part, batch, key: outputs(whole(part), batch, key)),
        unknown=None if unknown is None else lambda part, batch: unknown(whole(part), batch),
        fresh_params=None if fresh is None else lambda key: free_of(fresh(key)),
        check_model=None if check_model is None else lambda part, batch: check_model(whole(part), batch),
    )
    return task, free, restored
