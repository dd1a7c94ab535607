"""DualProj (Lopez-Paz and Ranzato 2017; named by Quinton and Rey, arXiv 2406.16232): the mean, made conflict-free."""

import jax.numpy as jnp
import optax

from eupmu_jax._stack import nnls
from eupmu_jax.aggregators._weighting import from_gram


def dualproj(*, num_objectives: int | None = None) -> optax.GradientTransformationExtraArgs:
    r"""Moves the mean gradient by the least amount that conflicts with no objective.

    .. math::
      d = \arg\min_d \tfrac12 \|d - \bar g\|^2 \quad\text{s.t.}\quad \langle g_k, d\rangle \ge 0,\; k = 0..K-1

    It is unilateral surgery with the mean in place of the forget gradient and all objectives as constraints; the same
    exact solver finds :math:`\lambda \ge 0` in :math:`d = \bar g + \sum_k \lambda_k g_k`.

    Guarantee: to first order no loss rises. Opposite gradients give d = 0. Scale matters: a large gradient dominates
    the mean.

    Args:
      num_objectives: K, if it is not 2; at most 15. Needed where the state must keep one shape.

    Returns:
      A transform with a `WeightingState`.

    Raises:
      ValueError: For more than 15 objectives.

    >>> tx = dualproj()
    >>> tx.update(jnp.array([[-3.0, 1.0], [1.0, 0.0]]), tx.init(jnp.zeros(2)))[0].tolist()
    [0.0, 0.5]
    """
    project_mean = lambda gram: conflict_free(gram, jnp.full(len(gram), 1 / len(gram), gram.dtype))
    return from_gram(project_mean, num_objectives, at_most=nnls.MAX_CONSTRAINTS)


def conflict_free(gram, weights):
    r"""Weights `(K,)` of the vector nearest to :math:`\sum_k w_k g_k` that has no negative product with any row.

    >>> conflict_free(jnp.array([[2.0, -1.0], [-1.0, 1.0]]), jnp.array([1.0, 0.0])).round(5).tolist()
    [1.0, 1.0]
    """
    products = jnp.sum(gram * weights[None], axis=1)  # A matmul would round its factors on matrix units.
    whole = jnp.block([[jnp.sum(weights * products), products[None]], [products[:, None], gram]])
    return weights + nnls.solve_multipliers(whole, jnp.zeros_like(weights))
