"""The ordered weighted average of the objectives (Yager, 1988)."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from eupmu_jax import stacked


class OwaState(NamedTuple):
    """State of `owa`.

    Attributes:
      weights: `(K,)` weights of the rows in the last step.
      count: Number of steps taken.
      nonfinite_count: Number of steps refused because a gradient or loss was not finite.
    """

    weights: chex.Array
    count: chex.Array
    nonfinite_count: chex.Array


def owa(
    weights: chex.Array | None = None, *, forget_weight: float | None = None, num_objectives: int | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Weighs each objective by the rank of its loss, the largest first: no group pays for the average.

    .. math::
      l = \sum_j w_j l_{(j)}, \quad l_{(1)} \ge \dots \ge l_{(m)}, \qquad d = \nabla l = \sum_j w_j g_{(j)}

    Non-increasing weights are averse to risk, and make l convex in the losses: (1, 0, ..., 0) is the worst objective,
    1/m each the mean, and the default, Gini weights :math:`w_j = (2(m - j) + 1) / m^2` with j from 1, lies between.
    Losses must be on one scale; divide each by its initial value if they are not. Of tied losses either order gives a
    subgradient; the lower row comes first.

    Args:
      weights: Non-negative weights by rank, `(m,)`; None are Gini weights.
      forget_weight: None ranks all K rows. A number gives the forget row that weight and ranks the m = K-1 retain rows,
        the groups, alone.
      num_objectives: K, if it is not 2 and `weights` do not tell; needed where the state must keep one shape.

    Returns:
      A transform with `update(updates, state, params=None, *, losses, **extra_args)`, stacked tree in,
      parameter-shaped tree out. A step that is not finite gives zeros and changes nothing but `nonfinite_count`.

    Raises:
      ValueError: For negative weights, a number of weights other than m, or missing losses.

    >>> tx = owa()
    >>> grads, losses = jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([1.0, 3.0])
    >>> tx.update(grads, tx.init(jnp.zeros(2)), losses=losses)[0].tolist()
    [0.25, 0.75]
    """
    offset = 0 if forget_weight is None else 1
    if weights is not None:
        if np.ndim(weights) != 1:
            raise ValueError(f"weights: got shape {np.shape(weights)}, expected one weight for each rank")
        if not isinstance(weights, jax.core.Tracer) and not np.all(np.asarray(weights) >= 0):
            raise ValueError(f"weights: got {weights}, expected numbers >= 0")
        if num_objectives is not None and len(weights) != num_objectives - offset:
            raise ValueError(f"weights: got {len(weights)}, expected {num_objectives - offset}, one for each rank")
        num_objectives = len(weights) + offset

    def init_fn(params):
        return OwaState(
            weights=jnp.zeros(num_objectives or 2, stacked.accumulator_dtype(params)),
            count=jnp.zeros([], jnp.int32),
            nonfinite_count=jnp.zeros([], jnp.int32),
        )

    def update_fn(updates, state, params=None, *, losses=None, **extra_args):
        del extra_args
        k = stacked.count_objectives(updates, params)
        losses = stacked.check_losses(losses, k)
        if losses is None:
            raise ValueError(f"losses: got None, expected the ({k},) losses of this step: update(..., losses=losses)")
        if num_objectives is not None and k != num_objectives:
            raise ValueError(f"updates: got {k} objectives, expected {num_objectives} as set by weights")
        m, dtype = k - offset, state.weights.dtype
        by_rank = (2 * (m - jnp.arange(m)) - 1) / m**2 if weights is None else jnp.asarray(weights)
        order = jnp.argsort(-losses[offset:], stable=True)
        by_row = jnp.zeros(m, dtype).at[order].set(by_rank.astype(dtype))
        if forget_weight is not None:
            by_row = jnp.concatenate([jnp.full(1, forget_weight, dtype), by_row])

        direction = stacked.combine(updates, by_row, params)
        finite = stacked.all_finite((updates, losses))
        direction = jax.tree.map(lambda leaf: jnp.where(finite, leaf, jnp.zeros_like(leaf)), direction)
        old = state.weights if state.weights.shape == by_row.shape else jnp.zeros_like(by_row)
        return direction, OwaState(
            weights=jnp.where(finite, by_row, old),
            count=jnp.where(finite, optax.safe_increment(state.count), state.count),
            nonfinite_count=jnp.where(finite, state.nonfinite_count, optax.safe_increment(state.nonfinite_count)),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
