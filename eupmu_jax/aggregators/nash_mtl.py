"""Nash-MTL (Navon et al. 2022, arXiv 2202.01017): the Nash bargaining solution between the objectives."""

import chex
import jax
import jax.numpy as jnp
import optax

from eupmu_jax.aggregators._spectrum import divide_by_norms, norms_and_cosines
from eupmu_jax.aggregators._weighting import from_gram


def nash_mtl(*, num_objectives: int | None = None) -> optax.GradientTransformationExtraArgs:
    r"""Maximises the product of the descents of all losses among directions of one length.

    .. math::
      d = \sum_k a_k g_k, \qquad G a = 1 / a,\; a > 0
      \quad\Longleftrightarrow\quad a = \arg\min_{a > 0} \tfrac12 a^\top G a - \sum_k \log a_k

    .. math::
      a_k = \frac{1}{\|g_k\| \sqrt{1 + \cos(g_0, g_1)}} \text{ for } K = 2

    Guarantees: every loss descends, :math:`\langle g_k, d\rangle = 1 / a_k`; :math:`\|d\| = \sqrt K` for K gradients
    none of which is zero; scaling a gradient changes nothing. For K = 2 it has the direction of `ngdiff`, `imtl_g` and
    `config`, and is known in unlearning as MUNBa (arXiv 2411.15537).

    The convex problem is self-concordant, and is solved to rounding by damped Newton steps for any K; the authors solve
    a sequence of linearised ones, and then clip d to length 1: chain `optax.clip_by_global_norm(1.0)` for that.

    Cost: one forward and one backward pass over all examples; about ten (K, K) linear systems. Where gradients are
    opposite, or others have zero in their convex hull, a would be infinite: rounding, added to the diagonal of the unit
    gradients' Gram matrix, bounds it, and the part of d within that hull shrinks to 0. A zero gradient has weight 0,
    and the others bargain among themselves.

    Args:
      num_objectives: K, if it is not 2; needed where the state must keep one shape.

    Returns:
      A transform with a `WeightingState`.

    >>> tx = nash_mtl()
    >>> tx.update(jnp.array([[-2.0, 0.0], [0.0, 3.0]]), tx.init(jnp.zeros(2)))[0].round(4).tolist()
    [-1.0, 1.0]
    """

    def weigh(gram):
        norms, cosines = norms_and_cosines(gram)
        absent = jnp.diag((norms <= 0).astype(gram.dtype))
        return divide_by_norms(_bargain(cosines + absent), norms)

    return from_gram(weigh, num_objectives)


def _bargain(cosines: chex.Array) -> chex.Array:
    """Positive solution of `matrix @ a = 1 / a`."""
    k, eps = len(cosines), jnp.finfo(cosines.dtype).eps
    identity = jnp.eye(k, dtype=cosines.dtype)
    matrix = cosines + 4 * k * eps * identity
    if k == 2:
        return jnp.full(2, 1 / jnp.sqrt(matrix[0, 0] + matrix[0, 1]))

    def body(state):
        a, _, step = state
        # In units of a, where the Hessian is the identity plus something positive.
        scaled = matrix * a[:, None] * a[None]
        gradient = scaled.sum(axis=1) - 1
        with jax.default_matmul_precision("highest"):
            newton = jnp.linalg.solve(scaled + identity, gradient)
        decrement = jnp.sqrt(jnp.maximum(jnp.sum(gradient * newton), 0))
        # Within this length a stays positive, and the objective falls.
        return a * (1 - newton / (1 + decrement)), decrement, step + 1

    # Convergence is quadratic: the step that starts from the root of the rounding is the last.
    far = lambda state: (state[1] > jnp.sqrt(eps)) & (state[2] < 200)
    # Made from the data, to vary over devices inside `shard_map` as the rest does.
    start = (jnp.ones_like(cosines[0]), jnp.full_like(cosines[0, 0], jnp.inf), 0)
    return jax.lax.while_loop(far, body, start)[0]
