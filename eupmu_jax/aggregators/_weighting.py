"""What the aggregators share: a weight for each row, from the rows' Gram matrix or from the losses."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax.numpy as jnp
import optax

from eupmu_jax._stack import algebra, checks, refusal


class WeightingState(NamedTuple):
    """State of the aggregators that see only the Gram matrix; `tree_get` finds fields with names unique in the chain.

    Such an aggregator has `update(updates, state, params=None, *, losses=None, gram_fn=None, **extra_args)`, stacked
    tree in, parameter-shaped tree out. `losses` are only checked for being finite, `gram_fn` is as in
    `unilateral_surgery`. A step that is not finite gives zeros and changes nothing but `nonfinite_count`.

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


class LossWeightingState(NamedTuple):
    """State of the aggregators that see only the losses; `tree_get` finds fields whose names are unique in the chain.

    Such an aggregator has `update(updates, state, params=None, *, losses, **extra_args)`, stacked tree in,
    parameter-shaped tree out. A step that is not finite gives zeros and changes nothing but `nonfinite_count`.

    Attributes:
      weights: `(K,)` weights of the rows in the last step.
      memory: What the rule keeps between steps; empty for most.
      count: Number of steps taken.
      nonfinite_count: Number of steps refused because a gradient, loss or weight was not finite.
    """

    weights: chex.Array
    memory: Any
    count: chex.Array
    nonfinite_count: chex.Array


def count_of(num_objectives: int | None, **values: Any) -> int | None:
    """K, from the argument or from the values that are arrays; raises `ValueError` if they disagree.

    >>> count_of(None, weights=jnp.ones(3), ideal=0.0), count_of(None, ideal=0.0)
    (3, None)
    """
    for name, value in values.items():
        if jnp.ndim(value) and num_objectives not in (None, len(value)):
            raise ValueError(f"{name}: got {len(value)} values, expected {num_objectives}: one for each objective")
        num_objectives = len(value) if jnp.ndim(value) else num_objectives
    return num_objectives


def from_gram(
    weigh: Callable[..., chex.Array],
    num_objectives: int | None = None,
    *,
    with_count: bool = False,
    at_most: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The transform :math:`d = \sum_k w_k g_k` with :math:`w` a function of the Gram matrix.

    Args:
      weigh: `(K, K)` to `(K,)`, finite for every finite Gram matrix.
      num_objectives: K, if it is not 2; needed where the state must keep one shape.
      with_count: Calls `weigh(gram, count)`, with the number of steps taken, for rules that draw at random.
      at_most: The most objectives that `weigh` can solve for.

    Returns:
      A transform with a `WeightingState`.

    >>> tx = from_gram(lambda gram: 1 / jnp.sqrt(jnp.diagonal(gram)))
    >>> tx.update(jnp.array([[3.0, 0.0], [0.0, 4.0]]), tx.init(jnp.zeros(2)))[0].tolist()
    [1.0, 1.0]
    """
    checks.resolve_num_objectives(num_objectives)
    if num_objectives is not None:
        checks.check_count(num_objectives, None, "num_objectives", at_most=at_most)

    def init_fn(params):
        k, dtype = num_objectives or 2, algebra.accumulator_dtype(params)
        return WeightingState(jnp.zeros(k, dtype), jnp.zeros((k, k), dtype), *refusal.counters())

    def update_fn(updates, state, params=None, *, losses=None, gram_fn=None, **extra_args):
        del extra_args
        k = checks.count_objectives(updates, params, num_objectives)
        checks.check_count(k, None, at_most=at_most)
        losses = checks.check_losses(losses, k)
        gram = (gram_fn or algebra.gram_matrix)(updates)
        finite = jnp.all(jnp.isfinite(gram))
        if losses is not None:
            finite &= jnp.all(jnp.isfinite(losses))
        safe = jnp.where(finite, gram, jnp.eye(k, dtype=gram.dtype))
        weights = weigh(safe, state.count) if with_count else weigh(safe)
        # A setting that a schedule has made non-finite shows only in the weights.
        finite &= jnp.all(jnp.isfinite(weights))
        if state.gram.shape != gram.shape:
            state = state._replace(weights=jnp.zeros_like(weights), gram=jnp.zeros_like(gram))
        return refusal.settle(
            finite, algebra.combine(updates, weights, params), state._replace(weights=weights, gram=gram), state
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def from_losses(
    weigh: Callable[[chex.Array, LossWeightingState], tuple[chex.Array, Any]],
    num_objectives: int | None = None,
    *,
    memory: Callable[[int, Any], Any] = lambda num_objectives, dtype: (),
    at_first: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The transform :math:`d = \sum_k w_k g_k` with :math:`w` a function of the losses, present and past.

    Args:
      weigh: `(losses, state) -> (weights, memory)`, both `(K,)`; `state.memory` is what the last step returned,
        `state.count` the number of steps before. Weights or memory that are not finite refuse the step.
      num_objectives: K, if it is not 2; needed where the state must keep one shape.
      memory: `(K, dtype)` to the memory at the start.
      at_first: K of the state at the start, if `num_objectives` is None.

    Returns:
      A transform with a `LossWeightingState`.

    >>> tx = from_losses(lambda losses, state: (losses / losses.sum(), ()))
    >>> tx.update(jnp.eye(2), tx.init(jnp.zeros(2)), losses=jnp.array([1.0, 3.0]))[0].tolist()
    [0.25, 0.75]
    """
    checks.resolve_num_objectives(num_objectives)

    def init(k, dtype):
        return LossWeightingState(jnp.zeros(k, dtype), memory(k, dtype), *refusal.counters())

    def update_fn(updates, state, params=None, *, losses=None, **extra_args):
        del extra_args
        k = checks.count_objectives(updates, params, num_objectives)
        losses, dtype = checks.check_losses(losses, k, needed=True), state.weights.dtype
        if state.weights.shape != (k,):
            state = init(k, dtype)._replace(count=state.count, nonfinite_count=state.nonfinite_count)
        new = weigh(losses.astype(dtype), state)
        finite = algebra.all_finite((updates, losses, new))
        direction = algebra.combine(updates, new[0], params)
        return refusal.settle(finite, direction, state._replace(weights=new[0], memory=new[1]), state)

    return optax.GradientTransformationExtraArgs(
        lambda params: init(num_objectives or at_first or 2, algebra.accumulator_dtype(params)), update_fn
    )
