"""MGDA (Désidéri 2012; Sener and Koltun 2018, arXiv 1810.04650): the shortest vector in the gradients' convex hull."""

import chex
import jax.numpy as jnp
import optax

from eupmu_jax._stack import nnls
from eupmu_jax.aggregators._weighting import from_gram


def mgda(*, num_objectives: int | None = None) -> optax.GradientTransformationExtraArgs:
    r"""Descends all losses at one rate, or those that fall slowest, by the min-norm point of the convex hull.

    .. math::
      d = \sum_k w_k g_k, \qquad w = \arg\min_{w \ge 0,\, \sum w = 1} \tfrac12 \Big\|\sum_k w_k g_k\Big\|^2, \qquad
      w_0 = \operatorname{clip}_{[0, 1]} \frac{\langle g_1 - g_0, g_1\rangle}{\|g_0 - g_1\|^2} \text{ for } K = 2

    Guarantee: :math:`\langle g_k, d\rangle \ge \|d\|^2` for every k, so no loss rises to first order. The smallest
    gradient dominates: next to a retain loss that has converged, hardly anything is forgotten.

    Exact for any K up to 15, by the solver of `nnls`. Cost: one forward and one backward pass over all examples. A zero
    gradient, opposite gradients or any others with zero in their convex hull give d = 0. Equal gradients share their
    weight for K = 2; for larger K, the weights are one of several solutions, but d is unique.

    Args:
      num_objectives: K, if it is not 2; at most 15. Needed where the state must keep one shape.

    Returns:
      A transform with a `WeightingState`.

    Raises:
      ValueError: For more than 15 objectives.

    >>> tx = mgda()
    >>> tx.update(jnp.array([[-1.0, 1.0], [1.0, 0.0]]), tx.init(jnp.zeros(2)))[0].round(6).tolist()
    [0.2..., 0.4...]
    """
    return from_gram(min_norm, num_objectives, at_most=nnls.MAX_CONSTRAINTS)


def min_norm(gram: chex.Array) -> chex.Array:
    """Weights `(K,)` on the simplex of the shortest convex combination of rows with this Gram matrix.

    >>> min_norm(jnp.diag(jnp.array([1.0, 2.0, 2.0]))).round(5).tolist()
    [0.5, 0.25, 0.25]
    """
    diagonal = jnp.diagonal(gram)
    if len(gram) == 2:
        squared_distance = diagonal.sum() - 2 * gram[0, 1]
        # Each weight comes from its own difference: a tiny one, as of a row 1e8 times longer, would be lost as 1 minus
        # the other.
        shares = (diagonal[::-1] - gram[0, 1]) / jnp.where(squared_distance > 0, squared_distance, 1)
        return jnp.where(squared_distance > 0, jnp.clip(shares, 0, 1), 0.5)
    # Every row and the target get one more coordinate, s for a row and -s for the target, which turns the simplex into
    # a cone: the point nearest to the target has the direction that minimises |row| / s, so its weights only need
    # normalising to sum to 1. With the shortest row as the scale, no row is lost to rounding.
    scale = jnp.where(diagonal.min() > 0, diagonal.min(), jnp.where(diagonal.max() > 0, diagonal.max(), 1))
    edge = jnp.full(len(gram), -scale, gram.dtype)
    lifted = jnp.block([[scale[None, None], edge[None]], [edge[:, None], gram + scale]])
    weights = nnls.solve_multipliers(lifted, jnp.zeros_like(edge))
    return weights / weights.sum()
