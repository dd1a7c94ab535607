"""Surgery on part of the parameters, the rest frozen."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from eupmu_jax._stack import checks


def freeze(
    inner: optax.GradientTransformation, frozen: "chex.ArrayTree | Callable[[chex.ArrayTree], chex.ArrayTree]"
) -> optax.GradientTransformationExtraArgs:
    """Runs `inner` on the parameters that are not frozen; the others get zero updates of their own shape.

    Gram matrix, multipliers and the state of every optimizer in `inner` cover the trainable leaves only. Use this in
    place of `optax.masked`, `optax.partition` or `optax.selective_transform` around a surgery: they pass the frozen
    leaves of a stacked tree on with their objective axis, and adding those to the parameters would broadcast them.

    Args:
      inner: A chain, usually one that begins with a stacked transform. It sees frozen leaves as None.
      frozen: Tree of bools with the structure of the parameters, True where frozen, or a function of the parameters
        that returns one.

    Returns:
      A transform; a `value_fn` given to `update` still receives the whole parameters.

    Raises:
      ValueError: If `frozen` has another structure than the parameters, or freezes them all.

    >>> from eupmu_jax.surgery.explicit import unilateral_surgery
    >>> params = {"body": jnp.ones(2), "head": jnp.ones(1)}
    >>> tx = freeze(optax.chain(unilateral_surgery(), optax.sgd(1.0)), {"body": True, "head": False})
    >>> grads = {"body": jnp.ones((2, 2)), "head": jnp.ones((2, 1))}
    >>> updates, _ = tx.update(grads, tx.init(params), params)
    >>> updates["body"].tolist(), updates["head"].tolist()
    ([0.0, 0.0], [-1.0])
    """
    inner = optax.with_extra_args_support(inner)

    def mask_of(params):
        mask = frozen(params) if callable(frozen) else frozen
        checks.check_same_structure("frozen", mask, "params", params)
        for path, leaf in jax.tree_util.tree_leaves_with_path(mask):
            if not isinstance(leaf, bool | np.bool_):
                raise ValueError(
                    f"frozen: leaf {checks.describe(path)} is {leaf!r}, expected True or False, known before tracing"
                )
        if all(jax.tree.leaves(mask)):
            raise ValueError("frozen: every leaf is frozen; expected at least one trainable leaf")
        return mask

    def trainable(mask, tree):
        return jax.tree.map(lambda is_frozen, leaf: None if is_frozen else leaf, mask, tree)

    def init_fn(params):
        if not jax.tree.leaves(params):  # The placeholder of optax.tree_map_params.
            return inner.init(params)
        return inner.init(trainable(mask_of(params), params))

    def update_fn(updates, state, params=None, *, value_fn=None, **extra_args):
        if params is None:
            raise ValueError("params: got None, expected the parameters: frozen leaves get zero updates of their shape")
        mask = mask_of(params)
        checks.check_same_structure("updates", updates, "params", params)
        if value_fn is not None:

            def value_of_trainable(part):
                return value_fn(_fill(mask, part, params))

            extra_args["value_fn"] = value_of_trainable
        updates, state = inner.update(trainable(mask, updates), state, trainable(mask, params), **extra_args)
        return _fill(mask, updates, jax.tree.map(jnp.zeros_like, params)), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _fill(mask, trainable, frozen):
    """The whole tree, from its trainable part (None where frozen) and values for the frozen leaves."""
    leaves = iter(jax.tree.leaves(trainable))
    return jax.tree.map(lambda is_frozen, leaf: leaf if is_frozen else next(leaves), mask, frozen)
