"""Surgery on part of the parameters, the rest frozen."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from eupmu_jax._stack import checks
from eupmu_jax._stack.frozen import joined, mask_of, split


def freeze(
    inner: optax.GradientTransformation, frozen: "Any | Callable[[Any], Any]"
) -> optax.GradientTransformationExtraArgs:
    """Runs `inner` on the parameters that are not frozen; the others get zero updates of their own shape.

    Gram matrix, multipliers and the state of every optimizer in `inner` cover the trainable leaves only. Use this in
    place of `optax.masked`, `optax.partition` or `optax.selective_transform` around a surgery: they pass the frozen
    leaves of a stacked tree on with their objective axis, and adding those to the parameters would broadcast them.

    Gradients of frozen leaves are still computed, at K times their size, and must exist. If the base model is large or
    quantised, let the loss close over it and pass only the trained part to the step, as `unlearn(frozen=...)` does. The
    state has None in place of frozen leaves: a function that reads it along with the parameters, such as
    `optax.contrib.schedule_free_eval_params`, needs parameters with None there too.

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
    inner = checks.as_transform("inner", inner)

    def init_fn(params):
        if not jax.tree.leaves(params):  # The placeholder of optax.tree_map_params.
            return inner.init(params)
        return inner.init(split(mask_of(params, frozen), params)[0])

    def update_fn(updates, state, params=None, *, value_fn=None, **extra_args):
        if params is None:
            raise ValueError("params: got None, expected the parameters: frozen leaves get zero updates of their shape")
        mask = mask_of(params, frozen)
        checks.check_same_structure("updates", updates, "params", params)
        free, fixed = split(mask, params)
        if value_fn is not None:

            def value_of_trainable(part):
                return value_fn(joined(part, fixed))

            extra_args["value_fn"] = value_of_trainable
        updates, state = inner.update(split(mask, updates)[0], state, free, **extra_args)
        return joined(updates, jax.tree.map(jnp.zeros_like, fixed)), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
