"""IMTL-G (Liu et al. 2021, "Towards Impartial Multi-task Learning", Equation 6): equal projections on all gradients."""

import jax.numpy as jnp
import optax

from eupmu_jax.aggregators._spectrum import apply_to_ones, norms_and_cosines
from eupmu_jax.aggregators._weighting import from_gram


def imtl_g(*, num_objectives: int | None = None) -> optax.GradientTransformationExtraArgs:
    r"""The affine combination of the gradients that has the same projection on each of them.

    .. math::
      d = \sum_k w_k g_k, \quad \langle u_i, d\rangle = \langle u_j, d\rangle, \quad \sum_k w_k = 1, \qquad
      w \propto N^{-1} C^{+} 1, \qquad
      d = \frac{n_0 n_1}{n_0 + n_1} (u_0 + u_1) \text{ for } K = 2

    with lengths :math:`n_k = \|g_k\|` on the diagonal of N, unit gradients :math:`u_k = g_k / n_k` and their Gram
    matrix C. For K = 2 it has the direction of `ngdiff`, `nash_mtl` and `config`; only the length differs.

    TorchJD takes the pseudo-inverse of the Gram matrix itself, which is the same if the gradients are independent. That
    of C does not depend on their scale, and for parallel gradients gives the limit of nearly parallel ones.

    Cost: one forward and one backward pass over all examples. Opposite gradients give d = 0, and so does a zero
    gradient. For K > 2 weights can be negative and, if that of a short gradient is, have a negative sum before
    normalisation: d then raises all losses, as the paper's formula implies. If they sum to zero, d = 0.

    Args:
      num_objectives: K, if it is not 2; needed where the state must keep one shape.

    Returns:
      A transform with a `WeightingState`.

    >>> tx = imtl_g()
    >>> tx.update(jnp.array([[-1.0, 0.0], [0.0, 3.0]]), tx.init(jnp.zeros(2)))[0].round(6).tolist()
    [-0.75, 0.75]
    """

    def weigh(gram):
        norms, cosines = norms_and_cosines(gram)
        # Over the shortest length, so that a row that shrinks to zero takes all the weight.
        ratios = jnp.where(norms > 0, norms.min() / jnp.where(norms > 0, norms, 1), 1)
        weights = ratios * apply_to_ones(cosines, lambda values, rank: 1 / values)
        total = weights.sum()
        defined = jnp.abs(total) > 16 * jnp.finfo(gram.dtype).eps * jnp.abs(weights).sum()
        return jnp.where(defined, weights / jnp.where(defined, total, 1), 0)

    return from_gram(weigh, num_objectives)
