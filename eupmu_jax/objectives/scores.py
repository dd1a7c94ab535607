r"""Transport of scores: forgotten examples are to have the scores of data that the model never saw.

A score says how sure a model is of an example, on a scale without ends. With the probability p that the model gives to
the true answer it is the log-odds

.. math:: s = \log p - \log(1 - p),

the score of LiRA (Carlini et al. 2022, arXiv 2112.03570). Its derivative by the true logit is 1 wherever the model
stands. That of the loss, 1 - p, vanishes on memorised examples, so ascent on the loss does not move them.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from eupmu_jax.objectives._logits import promoted
from eupmu_jax.objectives.language import answer_lengths, sequence_nll

# Weight of a score below its target, relative to one above it.
UPWARD = 0.25
# Losses of sequences below this are not told apart: float32 resolves no probability nearer to 1.
CERTAIN = 1e-7


def log_odds(logits: chex.Array, labels: chex.Array) -> jax.Array:
    """The log-odds of each label, `(n,)`, from logits `(n, classes)` and int labels `(n,)`; float32 at least.

    The label's logit minus the log-sum-exp of all others, so it is finite for all finite logits, however sure the model
    is. A class masked out by a logit of minus infinity has minus infinity.

    >>> log_odds(jnp.array([[100.0, 0.0], [0.0, 100.0]]), jnp.array([0, 0])).tolist()
    [100.0, -100.0]
    """
    logits = promoted(logits)
    is_label = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    others = jax.nn.logsumexp(logits, axis=-1, where=~is_label)
    return jnp.sum(logits, axis=-1, where=is_label) - others


def sequence_log_odds(nll: chex.Array, mask: chex.Array) -> jax.Array:
    r"""The log-odds of each sequence's length-normalised probability :math:`e^{-L_i / |y_i|}`, `(n,)`.

    At most 16, since float32 knows no probability nearer to 1; there its gradient is 0. A sequence without an answer
    counts as certain.

    Args:
      nll: Loss of each token, `(n, T)`.
      mask: Which tokens are the answer, `(n, T)`.

    >>> sequence_log_odds(jnp.log(jnp.array([[2.0, 2.0]])), jnp.ones((1, 2))).tolist()
    [0.0]
    """
    means = sequence_nll(nll, mask) / jnp.maximum(answer_lengths(mask), 1)
    means = jnp.maximum(means, CERTAIN)
    # log p - log(1 - p) for p = exp(-mean), whose difference from 1 is lost in float32.
    return -means - jnp.log(-jnp.expm1(-means))


def transport(scores: chex.Array, targets: chex.Array) -> jax.Array:
    r"""The cost of moving scores to their targets, mean over the examples of a batch.

    .. math:: \frac1n \sum_i w(s_i - t_i)\, h(s_i - t_i), \qquad w(d) = 1 \text{ if } d > 0, \text{ else } 1/4,

    where h is the Huber function, :math:`d^2 / 2` up to 1 and :math:`|d| - 1/2` beyond. With targets from
    `transport_targets`:

    - It is 0 exactly if every score is at its target. The scores then have the distribution of the unseen ones, and the
      gradient is 0 too: the loss rests where forgotten data look like unseen data.
    - Without the weights w it is at least the optimal transport distance, with cost h, between both distributions, and
      equal to it as long as the scores keep their order.
    - Far from the target its gradient by each score is 1, however sure the model is.

    Both sides are needed for it to rest: with w = 0 below the target, each example is pushed whenever noise lifts it,
    and long runs overshoot. With w = 1 examples that sank along with others are pulled up as strongly as memorised ones
    are pushed down, and short runs fall short. Training on the retain set lifts forgotten examples anyway, which a
    quarter makes up for. On an MLP on Fashion-MNIST that forgets 10 % (two seeds) it ended nearer to the retrained
    model than 0 after 100, 200 and 400 steps, nearer than 1 after 100, and at least as near later; on a ResNet that
    forgets half (one seed) 0 ended nearer.

    As targets are fixed before the run, nothing is sorted in a step. A batch may be of any size and be sharded, and a
    batch of one example pulls it to its own quantile.

    Args:
      scores: `(n,)`.
      targets: `(n,)`; constants of the differentiation.

    Returns:
      A scalar, at least 0; in float32 at least.

    >>> transport(jnp.array([3.0, 0.0, -2.0]), jnp.array([1.0, 0.0, -1.0])).tolist()
    0.5416...
    """
    distances = promoted(scores) - jax.lax.stop_gradient(promoted(targets))
    return jnp.mean(jnp.where(distances > 0, 1.0, UPWARD) * optax.losses.huber_loss(distances))


def transport_targets(scores: np.ndarray, unseen: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    r"""The target of each score: the quantile of the unseen scores at its own rank.

    .. math:: t_i = \min\left(s_i,\; Q\left(\frac{r_i + 1/2}{n}\right)\right), \quad r_i = 0, \dots, n - 1,

    Q interpolates linearly between the unseen scores, each in the middle of its share (Hazen's definition), and is
    constant beyond the first and the last. With as many unseen scores the targets are these scores, sorted. The rank
    keeps the order that the original model gives the examples: the least certain ones are to be wrong.

    No target is above its score. Unseen data that the original model finds easier than the forget set teach it nothing.

    Ties keep the order of the examples. One example gets the median. Fewer unseen scores than examples, down to one,
    are interpolated.

    Args:
      scores: `(n,)`, of the original model on the forget set.
      unseen: `(m,)`, of the original model on data that it never saw.
      weights: `(m,)`, at least 0 and not all 0, so that the unseen data has the mix of the forget set; equal if None.

    Returns:
      `(n,)`, float32.

    Raises:
      ValueError: For scores that are empty or not finite, or weights of another shape.

    >>> transport_targets(np.array([9.0, 7.0, 8.0]), np.array([-1.0, 5.0, 3.0])).tolist()
    [5.0, -1.0, 3.0]
    >>> transport_targets(np.array([9.0]), np.array([0.0, 4.0])).tolist()
    [2.0]
    """
    scores, unseen = (np.asarray(each, np.float64) for each in (scores, unseen))
    for name, each in (("scores", scores), ("unseen", unseen)):
        if each.ndim != 1 or not len(each):
            raise ValueError(f"{name}: got shape {each.shape}, expected (n,), with at least one score")
        if not np.isfinite(each).all():
            position = int(np.argmin(np.isfinite(each)))
            raise ValueError(f"{name}: got {each[position]} at position {position}, expected finite scores")
    weights = np.ones(len(unseen)) if weights is None else np.asarray(weights, np.float64)
    if weights.shape != unseen.shape or not (np.isfinite(weights) & (weights >= 0)).all() or not weights.any():
        given = f"{weights.shape} with a sum of {weights.sum():g}"
        raise ValueError(f"weights: got {given}, expected {unseen.shape}, at least 0 and not all 0")
    order = np.argsort(unseen, kind="stable")
    shares = weights[order] / weights.sum()
    ranks = np.empty(len(scores))
    ranks[np.argsort(scores, kind="stable")] = (np.arange(len(scores)) + 0.5) / len(scores)
    counted = shares > 0
    middles = (np.cumsum(shares) - shares / 2)[counted]
    return np.minimum(scores, np.interp(ranks, middles, unseen[order][counted])).astype(np.float32)
