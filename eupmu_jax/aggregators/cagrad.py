"""CAGrad (Liu et al. 2021, arXiv 2110.14048, Algorithm 1): near the mean, the best direction for the worst loss."""

import chex
import jax
import jax.numpy as jnp
import optax

from eupmu_jax._stack import nnls
from eupmu_jax._stack.checks import check_number
from eupmu_jax.aggregators._weighting import from_gram
from eupmu_jax.aggregators.mgda import min_norm


def cagrad(c: float = 0.4, *, num_objectives: int | None = None) -> optax.GradientTransformationExtraArgs:
    r"""Maximises the descent of the objective that descends least, within c of the mean gradient.

    .. math::
      d = \arg\max_{\|d - \bar g\| \le c \|\bar g\|} \min_k \langle g_k, d\rangle
        = \bar g + \frac{c \|\bar g\|}{\|g_w\|} g_w, \qquad
      w = \arg\min_{w \ge 0,\, \sum w = 1} \langle g_w, \bar g\rangle + c \|\bar g\| \|g_w\|, \quad
      g_w = \sum_k w_k g_k

    d is as Algorithm 1 and TorchJD leave it; the authors' code multiplies it by :math:`K / (1 + c^2)` afterwards.
    c = 0 is the mean; for c < 1 the mean loss descends.

    The minimisation is exact, for any K up to 15: with t in place of :math:`\|g_w\|`, w is the min-norm point of the
    rows :math:`c \|\bar g\| g_k + t \bar g`, and :math:`\|g_w\|` grows with t more slowly than t, so that the t where
    they meet is found by secants within a bracket. Cost: one forward and one backward pass over all examples; about ten
    `mgda` problems.

    A mean of zero (opposite gradients of one length) gives d = 0. Where :math:`g_w = 0` the second term has no
    direction and is left out, as in the paper's code; TorchJD gives d = 0 there.

    Args:
      c: Radius of the ball around the mean gradient, relative to its length.
      num_objectives: K, if it is not 2; needed where the state must keep one shape.

    Returns:
      A transform with a `WeightingState`.

    Raises:
      ValueError: For a c that is negative or not finite, or K above 15.

    >>> tx = cagrad(c=0.4)
    >>> tx.update(jnp.array([[-1.0, 1.0], [1.0, 0.0]]), tx.init(jnp.zeros(2)))[0].round(6).tolist()
    [0.2..., 0.5...]
    """
    check_number("c", c, 0, finite=True)
    weigh = lambda gram: _weigh(gram, jnp.asarray(c, gram.dtype))
    return from_gram(weigh, num_objectives, at_most=nnls.MAX_CONSTRAINTS)


def _weigh(gram: chex.Array, c: chex.Array) -> chex.Array:
    k, eps = len(gram), jnp.finfo(gram.dtype).eps
    largest = jnp.diagonal(gram).max()
    gram = gram / jnp.where(largest > 0, largest, 1)
    products = gram.mean(axis=1)
    mean_squared_norm = jnp.maximum(products.mean(), 0)
    radius = c * jnp.sqrt(mean_squared_norm)

    def solve(t):
        cross = radius * t * (products[:, None] + products[None])
        weights = min_norm(radius**2 * gram + cross + t**2 * mean_squared_norm)
        terms = weights[:, None] * weights[None] * gram
        squared_norm = jnp.where(terms.sum() > 16 * eps * jnp.abs(terms).sum(), terms.sum(), 0)
        return weights, jnp.sqrt(squared_norm)

    def body(state):
        low, high, (t, norm), (last_t, last_norm), _, step = state
        # The norm grows with t, so that beyond either end of the bracket it cannot meet t.
        low, high = jnp.where(norm > t, jnp.maximum(low, norm), low), jnp.where(norm > t, high, jnp.minimum(high, norm))
        slope = (norm - last_norm) / jnp.where(t == last_t, 1, t - last_t)
        guess = (norm - slope * t) / jnp.where(slope == 1, 1, 1 - slope)
        inside = (guess > low) & (guess < high) & (t != last_t) & (slope != 1) & (step % 4 < 3)
        new = jnp.where(inside, guess, jnp.where(low > 0, jnp.sqrt(low) * jnp.sqrt(high), norm))
        weights, new_norm = solve(new)
        return low, high, (new, new_norm), (t, norm), weights, step + 1

    def apart(state):
        _, _, (t, norm), _, _, step = state
        return (jnp.abs(norm - t) > 16 * eps * t) & (step < 60)

    longest = jnp.sqrt(jnp.diagonal(gram).max())
    weights, norm = solve(longest)
    start = (jnp.zeros_like(longest), longest, (longest, norm), (longest, norm), weights, 0)
    _, _, (_, norm), _, weights, _ = jax.lax.while_loop(apart, body, start)
    return 1 / k + jnp.where(norm > 0, radius / jnp.where(norm > 0, norm, 1), 0) * weights
