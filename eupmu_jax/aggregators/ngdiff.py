"""NGDiff (Bu et al. 2024, arXiv 2410.22086): the difference of the normalised gradients."""

import jax.numpy as jnp
import optax

from eupmu_jax.aggregators._spectrum import divide_by_norms, norms_and_cosines
from eupmu_jax.aggregators._weighting import from_gram


def ngdiff(*, num_objectives: int | None = None) -> optax.GradientTransformationExtraArgs:
    r"""Gives all gradients length one and adds them up.

    .. math::
      d = \sum_k \frac{g_k}{\|g_k\|}

    The paper takes the gradient of a forget loss that should rise from that of a retain loss that should fall. Here row
    0 is the gradient of what is minimised (the negative loss, say), which makes the difference a sum; for K > 2 it runs
    over all retain rows, which is our generalisation.

    Guarantee for K = 2: no loss rises to first order, since :math:`\langle g_k, d\rangle = n_k (1 + \cos) \ge 0`. The
    direction is the bisector, that of `nash_mtl`, `imtl_g` and `config`; the length lies in [0, K]. The lengths of the
    gradients are discarded, so everything depends on the step size: the paper pairs it with `scale_by_gen` on the
    retain loss. Adam after it discards the length of d too.

    Cost: one forward and one backward pass over all examples. A zero gradient is left out; opposite ones give d = 0.

    Args:
      num_objectives: K, if it is not 2; needed where the state must keep one shape.

    Returns:
      A transform with a `WeightingState`.

    >>> tx = ngdiff()
    >>> tx.update(jnp.array([[-5.0, 0.0], [0.0, 2.0]]), tx.init(jnp.zeros(2)))[0].tolist()
    [-1.0, 1.0]
    """

    def weigh(gram):
        norms, _ = norms_and_cosines(gram)
        return divide_by_norms(jnp.ones_like(norms), norms)

    return from_gram(weigh, num_objectives)
