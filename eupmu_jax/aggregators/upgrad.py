"""UPGrad (Quinton and Rey, Jacobian descent, arXiv 2406.16232): every gradient made conflict-free, then the mean."""

import jax
import jax.numpy as jnp
import optax

from eupmu_jax._stack import nnls
from eupmu_jax.aggregators._weighting import from_gram
from eupmu_jax.aggregators.dualproj import conflict_free


def upgrad(*, num_objectives: int | None = None) -> optax.GradientTransformationExtraArgs:
    r"""Projects each gradient onto the cone of directions without conflict, and averages the projections.

    .. math::
      d = \frac1K \sum_i \Pi(g_i), \qquad
      \Pi(g) = \arg\min_d \tfrac12 \|d - g\|^2 \;\text{s.t.}\; \langle g_k, d\rangle \ge 0,\; k = 0..K-1

    Guarantees: to first order no loss rises, and a gradient scaled by c > 0 scales its own projection by c and leaves
    the others unchanged. For two objectives it is half of PCGrad. Opposite gradients give d = 0. The projections are
    exact; the authors' code adds 1e-4 to the diagonal of the normalised Gram matrix.

    Args:
      num_objectives: K, if it is not 2; at most 15. Needed where the state must keep one shape.

    Returns:
      A transform with a `WeightingState`.

    Raises:
      ValueError: For more than 15 objectives.

    >>> tx = upgrad()
    >>> tx.update(jnp.array([[-1.0, 1.0], [1.0, 0.0]]), tx.init(jnp.zeros(2)))[0].tolist()
    [0.25, 0.75]
    """

    def weigh(gram):
        projected = jax.vmap(lambda row: conflict_free(gram, row))(jnp.eye(len(gram), dtype=gram.dtype))
        return projected.mean(axis=0)

    return from_gram(weigh, num_objectives, at_most=nnls.MAX_CONSTRAINTS)
