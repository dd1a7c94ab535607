"""Augmented Chebyshev scalarisation (Steuer and Choo 1983): the worst objective, plus a little of all."""

import chex
import jax.numpy as jnp
import numpy as np
import optax

from eupmu_jax._stack.checks import check_number, check_numbers
from eupmu_jax.aggregators._weighting import count_of, from_losses


def chebyshev(
    rho: float = 1e-3,
    weights: "chex.Numeric" = 1.0,
    ideal: "chex.Numeric" = 0.0,
    *,
    num_objectives: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Descends the objective that is furthest from its ideal.

    .. math::
      l = \max_k s_k + \rho \sum_k s_k, \quad s_k = w_k [l_k - z_k]_+, \qquad
      d = \nabla l = \sum_k (1[k = \arg\max s] + \rho)\, w_k 1[l_k > z_k]\, g_k

    Every properly Pareto optimal point is the minimum for some weights and a small enough rho; rho > 0 excludes weak
    optima. Losses must be on one scale, or be put there by the weights. Of tied objectives, the lower row counts as the
    worst.

    Cost: one forward and one backward pass over all examples. Objectives at or below their ideal have weight 0, and
    d = 0 if all are. Next to a loss without a lower bound, such as a negated cross-entropy, no ideal means much: the
    forget loss falls below it at once, and is then ignored.

    Args:
      rho: Weight of the sum.
      weights: w, a number or `(K,)`.
      ideal: z, a number or `(K,)`: the losses at which nothing is left to gain.
      num_objectives: K, if it is not 2 and no array gives it; needed where the state must keep one shape.

    Returns:
      A transform with a `LossWeightingState`.

    Raises:
      ValueError: For a negative rho or weight, arrays of another shape, or missing losses.

    >>> tx = chebyshev(rho=0.5)
    >>> tx.update(jnp.eye(2), tx.init(jnp.zeros(2)), losses=jnp.array([1.0, 3.0]))[0].tolist()
    [0.5, 1.5]
    """
    check_number("rho", rho, 0, finite=True)
    at_first = count_of(num_objectives, weights=weights, ideal=ideal)
    check_numbers("weights", weights, 0, finite=True)
    check_numbers("ideal", ideal, finite=True)

    def weigh(losses, state):
        del state
        values, slopes = excess(losses, weights, ideal)
        worst = (jnp.arange(len(losses)) == jnp.argmax(values)).astype(losses.dtype)
        return (worst + jnp.asarray(rho, losses.dtype)) * slopes, ()

    return from_losses(weigh, num_objectives, at_first=at_first)


def excess(losses: chex.Array, weights: "chex.Numeric", ideal: "chex.Numeric") -> tuple[chex.Array, chex.Array]:
    r"""Weighted excesses :math:`w_k [l_k - z_k]_+` over the ideal, `(K,)`, and their derivatives in the losses.

    >>> values, slopes = excess(jnp.array([1.0, 3.0]), 2.0, jnp.array([0.0, 4.0]))
    >>> values.tolist(), slopes.tolist()
    ([2.0, 0.0], [2.0, 0.0])
    """
    for name, value in (("weights", weights), ("ideal", ideal)):
        if np.shape(value) not in ((), losses.shape):
            raise ValueError(f"{name}: got shape {np.shape(value)}, expected a number or {losses.shape}")
    above = losses > jnp.asarray(ideal, losses.dtype)
    slopes = jnp.where(above, jnp.asarray(weights, losses.dtype), 0)
    return slopes * jnp.maximum(losses - jnp.asarray(ideal, losses.dtype), 0), slopes
