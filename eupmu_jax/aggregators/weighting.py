"""What all aggregators share that weigh the rows by their Gram matrix alone."""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from eupmu_jax import stacked


class WeightingState(NamedTuple):
    """State of the aggregators that see the Gram matrix alone; every field can be read with `tree_get`.

    Attributes:
      weights: `(K,)` weights of the rows in the last step.
      gram: `(K, K)` Gram matrix of the last step's gradients.
      count: Number of steps taken.
      nonfinite_count: Number of steps refused because a gradient or loss was not finite.
    """

    weights: chex.Array
    gram: chex.Array
    count: chex.Array
    nonfinite_count: chex.Array


def from_gram(
    weigh: Callable[[chex.Array], chex.Array], num_objectives: int | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""The transform :math:`d = \sum_k w_k g_k` with :math:`w` a function of the Gram matrix.

    Args:
      weigh: `(K, K)` to `(K,)`, finite for every finite Gram matrix.
      num_objectives: K, if it is not 2; needed where the state must keep one shape.

    Returns:
      A transform with `update(updates, state, params=None, *, losses=None, gram_fn=None, **extra_args)`, stacked tree
      in, parameter-shaped tree out; `losses` are looked at only for being finite, `gram_fn` is as in
      `unilateral_surgery`. A step that is not finite gives zeros and changes nothing but `nonfinite_count`.

    >>> tx = from_gram(lambda gram: 1 / jnp.sqrt(jnp.diagonal(gram)))
    >>> tx.update(jnp.array([[3.0, 0.0], [0.0, 4.0]]), tx.init(jnp.zeros(2)))[0].tolist()
    [1.0, 1.0]
    """

    def init_fn(params):
        k, dtype = num_objectives or 2, stacked.accumulator_dtype(params)
        return WeightingState(
            weights=jnp.zeros(k, dtype),
            gram=jnp.zeros((k, k), dtype),
            count=jnp.zeros([], jnp.int32),
            nonfinite_count=jnp.zeros([], jnp.int32),
        )

    def update_fn(updates, state, params=None, *, losses=None, gram_fn=None, **extra_args):
        del extra_args
        k = stacked.count_objectives(updates, params)
        if num_objectives is not None and k != num_objectives:
            raise ValueError(f"updates: got {k} objectives, expected num_objectives = {num_objectives}")
        losses = stacked.check_losses(losses, k)
        gram = (gram_fn or stacked.gram_matrix)(updates)
        finite = jnp.all(jnp.isfinite(gram))
        if losses is not None:
            finite &= jnp.all(jnp.isfinite(losses))
        new = weigh(jnp.where(finite, gram, jnp.eye(k, dtype=gram.dtype))), gram
        old = state.weights, state.gram
        if state.gram.shape != gram.shape:
            old = jax.tree.map(jnp.zeros_like, new)
        direction = stacked.combine(updates, new[0], params)
        direction = jax.tree.map(lambda leaf: jnp.where(finite, leaf, jnp.zeros_like(leaf)), direction)
        weights, gram = jax.tree.map(lambda new, old: jnp.where(finite, new, old).astype(old.dtype), new, old)
        return direction, WeightingState(
            weights=weights,
            gram=gram,
            count=jnp.where(finite, optax.safe_increment(state.count), state.count),
            nonfinite_count=jnp.where(finite, state.nonfinite_count, optax.safe_increment(state.nonfinite_count)),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
