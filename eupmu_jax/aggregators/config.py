"""ConFIG (Liu, Chu and Thuerey 2024, arXiv 2408.11104, Equation 2): equal angles, and the sum of the projections."""

import jax.numpy as jnp
import optax

from eupmu_jax.aggregators._spectrum import apply_to_ones, divide_by_norms, norms_and_cosines
from eupmu_jax.aggregators._weighting import from_gram


def config(*, num_objectives: int | None = None) -> optax.GradientTransformationExtraArgs:
    r"""The direction at the same angle to all gradients, as long as the sum of their projections on it.

    .. math::
      x = U^{+} 1, \qquad u = x / \|x\|, \qquad d = \Big(\sum_k \langle g_k, u\rangle\Big) u, \qquad
      d = \frac{n_0 + n_1}{2} (u_0 + u_1) \text{ for } K = 2

    with the unit gradients :math:`u_k = g_k / n_k` as the rows of U. Guarantee: for independent gradients all losses
    descend at rates in proportion to their gradients' lengths. For K = 2 the direction is the bisector, that of
    `ngdiff`, `nash_mtl` and `imtl_g`.

    Cost: one forward and one backward pass over all examples, and a (K, K) eigenproblem. For dependent gradients the
    pseudo-inverse takes the least-squares direction, which may conflict with some. Opposite gradients give d = 0. A
    zero gradient is left out.

    Args:
      num_objectives: K, if it is not 2; needed where the state must keep one shape.

    Returns:
      A transform with a `WeightingState`.

    >>> tx = config()
    >>> tx.update(jnp.array([[-1.0, 0.0], [0.0, 3.0]]), tx.init(jnp.zeros(2)))[0].round(5).tolist()
    [-2.0, 2.0]
    """

    def weigh(gram):
        norms, cosines = norms_and_cosines(gram)
        best = apply_to_ones(cosines, lambda values, rank: 1 / values)
        products = jnp.sum(cosines * best[None], axis=1)
        squared_norm = jnp.sum(best * products)
        length = jnp.where(
            squared_norm > 0, jnp.sum(norms * products) / jnp.where(squared_norm > 0, squared_norm, 1), 0
        )
        return divide_by_norms(length * best, norms)

    return from_gram(weigh, num_objectives)
