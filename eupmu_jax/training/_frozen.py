"""The part of a model that is trained, as a task of its own."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eupmu_jax._stack.programs import owner
from eupmu_jax.tasks import Task


def mask_of(params, frozen):
    """The tree of bools, where it is given as a function of the parameters or as None.

    Raises:
      ValueError: For a tree of another structure than the parameters, or of something else than bools.
    """
    if frozen is None:
        return jax.tree.map(lambda _: False, params)
    mask = frozen(params) if callable(frozen) else frozen
    structures = [str(jax.tree.structure(tree)) for tree in (mask, params)]
    if structures[0] != structures[1]:
        raise ValueError(f"frozen: got structure {structures[0]}, expected that of params, {structures[1]}")
    if wrong := [flag for flag in jax.tree.leaves(mask) if np.shape(flag) or np.asarray(flag).dtype != bool]:
        found = f"an array of shape {np.shape(wrong[0])}" if np.shape(wrong[0]) else repr(wrong[0])
        raise ValueError(f"frozen: got {found}, expected a bool for each leaf of the parameters")
    return mask


def split(params, mask) -> tuple[list, list, Any]:
    """The trainable leaves; all leaves, None in place of those; and the structure of the parameters."""
    flags, leaves = jax.tree.leaves(mask), jax.tree.leaves(params)
    pairs = list(zip(flags, leaves, strict=True))
    free = [leaf for is_frozen, leaf in pairs if not is_frozen]
    return free, [leaf if is_frozen else None for is_frozen, leaf in pairs], jax.tree.structure(params)


def joined(structure, fixed, free):
    """The parameters of which `split` made these."""
    leaves = iter(jax.tree.leaves(free))
    return jax.tree.unflatten(structure, [next(leaves) if leaf is None else leaf for leaf in fixed])


def trainable(task: Task, params, frozen):
    """The task and parameters without what is frozen, and a function that puts that back as it was given."""
    if frozen is None:
        return task, params, lambda part: part
    if all(jax.tree.leaves(frozen)):
        raise ValueError("frozen: every leaf is frozen, expected at least one trainable leaf")
    free, given, structure = split(params, frozen)
    fixed = [None if leaf is None else jnp.asarray(leaf) for leaf in given]
    # JAX has no 64 bits by default: what is given back must not have gone through it.
    whole, restored = (functools.partial(joined, structure, others) for others in (fixed, given))
    outputs, fresh, unknown = task.outputs, task.fresh_params, task.unknown
    task = task._replace(
        # Or the frozen arrays would stay with JAX after the run.
        outputs=owner(lambda part, batch, key: outputs(whole(part), batch, key)),
        unknown=None if unknown is None else lambda part, batch: unknown(whole(part), batch),
        fresh_params=None if fresh is None else lambda key: split(fresh(key), frozen)[0],
    )
    return task, free, restored
