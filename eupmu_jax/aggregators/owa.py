"""The ordered weighted average of the objectives (Yager, 1988)."""

import chex
import jax.numpy as jnp
import numpy as np
import optax

from eupmu_jax._stack.checks import check_number, check_numbers
from eupmu_jax.aggregators._weighting import LossWeightingState, from_losses

OwaState = LossWeightingState


def owa(
    weights: chex.Array | None = None, *, forget_weight: float | None = None, num_objectives: int | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Weights each objective by the rank of its loss, the largest first: no group pays for the average.

    .. math::
      l = \sum_j w_j l_{(j)}, \quad l_{(1)} \ge \dots \ge l_{(m)}, \qquad d = \nabla l = \sum_j w_j g_{(j)}

    Non-increasing weights are averse to risk, and make l convex in the losses: (1, 0, ..., 0) is the worst objective,
    1/m each the mean, and the default, Gini weights :math:`w_j = (2(m - j) + 1) / m^2` with j from 1, lies between.
    Losses must be on one scale; divide each by its initial value if they are not. For tied losses either order gives a
    subgradient; the lower row comes first.

    Args:
      weights: Non-negative weights by rank, `(m,)`; None gives Gini weights.
      forget_weight: None ranks all K rows. A number gives the forget row that weight and ranks the m = K-1 retain rows,
        the groups, alone.
      num_objectives: K, if it is not 2 and `weights` do not give it; needed where the state must keep one shape.

    Returns:
      A transform with an `OwaState`.

    Raises:
      ValueError: For negative weights, a number of weights other than m, or missing losses.

    >>> tx = owa()
    >>> grads, losses = jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([1.0, 3.0])
    >>> tx.update(grads, tx.init(jnp.zeros(2)), losses=losses)[0].tolist()
    [0.25, 0.75]
    """
    offset = 0 if forget_weight is None else 1
    if forget_weight is not None:
        check_number("forget_weight", forget_weight, 0, finite=True)
    if weights is not None:
        if np.ndim(weights) != 1:
            raise ValueError(f"weights: got shape {np.shape(weights)}, expected one weight for each rank")
        check_numbers("weights", weights, 0, finite=True)
        if num_objectives is not None and len(weights) != num_objectives - offset:
            raise ValueError(f"weights: got {len(weights)}, expected {num_objectives - offset}, one for each rank")
        num_objectives = len(weights) + offset

    def weigh(losses, state):
        del state
        m, dtype = len(losses) - offset, losses.dtype
        by_rank = (2 * (m - jnp.arange(m)) - 1) / m**2 if weights is None else jnp.asarray(weights)
        order = jnp.argsort(-losses[offset:], stable=True)
        by_row = jnp.zeros(m, dtype).at[order].set(by_rank.astype(dtype))
        if forget_weight is not None:
            by_row = jnp.concatenate([jnp.full(1, forget_weight, dtype), by_row])
        return by_row, ()

    return from_losses(weigh, num_objectives)
