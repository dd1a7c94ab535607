"""Attacks of an audit: can some examples be told apart from those that a model never saw?"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import chex
import numpy as np

from eupmu_jax._stack.checks import check_same_shapes
from eupmu_jax.metrics.lira import VARIANCE_FLOOR, log_odds

# Significance level of the bound on epsilon and of the intervals.
SIGNIFICANCE = 0.05
FALSE_POSITIVES = 0.01
# Fewest shadow models without an example that are needed to score it.
LEAST_SHADOWS = 2


class Attack(NamedTuple):
    """How well a per-example score separates some examples from those that were never seen.

    Attributes:
      auc: The probability that one of them has a smaller score than an unseen one; 0.5 is chance.
      low, high: Its 95 % interval.
      examples: `(n, m)`, the numbers of these and of unseen examples.
    """

    auc: float
    low: float
    high: float
    examples: tuple[int, int]

    @property
    def tells(self) -> bool:
        """Whether they can be told apart from unseen data, in either direction: a loss that is too large counts too."""
        return self.tells_among(1)

    def tells_among(self, count: int) -> bool:
        """As `tells`, for one of `count` attacks that together have the same false alarm rate (Bonferroni)."""
        from scipy import stats

        # One side may be clipped at 0 or 1.
        width = max(self.auc - self.low, self.high - self.auc)
        wider = stats.norm.ppf(1 - SIGNIFICANCE / 2 / count) / stats.norm.ppf(1 - SIGNIFICANCE / 2)
        return bool(abs(self.auc - 0.5) > width * wider)


class Canaries(NamedTuple):
    """What the same scores imply for privacy, if chance alone decided which examples were learned.

    Attributes:
      epsilon: Lower bound, at 95 % confidence, on the epsilon of any differentially private training that could have
        produced these scores.
      true_positives: Fraction of learned examples whose score is below that of all but 1 % of the unseen ones.
      low, high: Its 95 % interval (Wilson) at that threshold, without the noise of the threshold itself.
    """

    epsilon: float
    true_positives: float
    low: float
    high: float


def attack(scores: np.ndarray, unseen: np.ndarray) -> Attack:
    r"""The population attack, which calls an example a member if its score, such as its loss, is small.

    .. math:: A = P(\ell < \ell') + \tfrac12 P(\ell = \ell')

    The standard error is that of DeLong et al. (1988, "Comparing the areas under two or more correlated receiver
    operating characteristic curves") or that under chance, as in the Mann-Whitney test, whichever is larger. With few
    examples chance can give an area far from 0.5, around which the former is too small. Scores are assumed independent.
    If they share noise, as losses of a diffusion model share the times of a batch, both errors are too large, and the
    attack has less power than it could.

    Args:
      scores: `(n,)` scores of the examples in question; NaN counts as infinity.
      unseen: `(m,)` scores of examples that were never seen.

    >>> found = attack(np.arange(100.0), np.arange(100.0))
    >>> found.auc, found.tells
    (0.5, False)
    >>> attack(np.arange(100.0), np.arange(100.0) + 60).tells
    True
    """
    from scipy import stats

    # NaN is the loss of a diverged model, which knows nothing.
    scores, unseen = (np.nan_to_num(part, nan=np.inf, posinf=np.inf, neginf=-np.inf) for part in (scores, unseen))
    n, m = len(scores), len(unseen)
    ranks = stats.rankdata(np.concatenate([scores, unseen]))
    # For each score the fraction of unseen ones above it, and for each unseen one the fraction of scores below it.
    above = 1 - (ranks[:n] - stats.rankdata(scores)) / m
    below = (ranks[n:] - stats.rankdata(unseen)) / n
    auc, variance = float(np.mean(above)), sum(np.var(part) / len(part) for part in (above, below))
    width = 1.96 * max(variance, (n + m + 1) / (12 * n * m)) ** 0.5
    return Attack(auc, max(auc - width, 0.0), min(auc + width, 1.0), (n, m))


def canaries(scores: np.ndarray, unseen: np.ndarray) -> Canaries | None:
    """Bounds on privacy from jax-privacy's auditor; None without that library, which the extra `audit` installs.

    Args:
      scores, unseen: As in `attack`. The bound holds if both were drawn from the same distribution and chance decided
        which were learned, as for planted canaries; otherwise it only measures how far apart the two are.

    >>> found = canaries(np.arange(100.0), np.arange(100.0) + 500)
    >>> found is None or (found.epsilon > 2 and found.true_positives == 1)
    True
    """
    try:
        from jax_privacy.auditing import CanaryScoreAuditor
    except ModuleNotFoundError:
        return None
    from scipy import stats

    scores, unseen = np.asarray(scores, np.float64), np.asarray(unseen, np.float64)
    epsilon = float(CanaryScoreAuditor(-scores, -unseen).epsilon_clopper_pearson(SIGNIFICANCE))
    # Not from that library's curve, a hull around the real one, by which 2 % of examples never learned would count.
    called = scores < np.sort(unseen)[int(FALSE_POSITIVES * len(unseen))]
    interval = stats.binomtest(int(called.sum()), len(scores)).proportion_ci(1 - SIGNIFICANCE, method="wilson")
    return Canaries(epsilon, float(np.mean(called)), float(interval.low), float(interval.high))


def shadow_scores(losses: np.ndarray, shadow_losses: np.ndarray, seen: np.ndarray) -> np.ndarray:
    r"""Per-example scores of LiRA without models that saw the example (Carlini et al., arXiv 2112.03570, section 4.3).

    .. math:: z_i = (\bar\phi_i - \phi_i) / s

    where phi is as in `scores_beside`, its mean is over the shadow models that never saw example i, and s^2 is one
    variance for all examples, the mean of the variances within each: with few shadow models individual variances are
    mostly noise. Like a loss, the score is small for a member.

    Args:
      losses: `(n,)` losses under the model in question.
      shadow_losses: `(shadows, n)` losses under the shadow models.
      seen: `(shadows, n)` bools, whether the shadow model learned the example.

    Returns:
      `(n,)`; NaN for an example with a finite loss under fewer than two of the shadow models that never saw it.

    >>> shadow_losses = np.array([[1.0, 1.0], [1.4, 1.4]])
    >>> shadow_scores(np.array([0.1, 2.0]), shadow_losses, np.zeros((2, 2), bool)).round(1).tolist()
    [-7.6, 2.5]
    """
    phi, audited = _confidences(shadow_losses, losses)
    # An infinite loss would make the variance that all examples share infinite too.
    told = ~seen & np.isfinite(phi)
    phi, enough = np.where(told, phi, np.nan), told.sum(axis=0) >= LEAST_SHADOWS
    if not enough.any():
        return np.full(len(losses), np.nan)
    chosen = phi[:, enough]
    spread = np.sqrt(np.mean(np.nanvar(chosen, axis=0, ddof=1)) + VARIANCE_FLOOR)
    scores = np.full(len(losses), np.nan)
    scores[enough] = (np.nanmean(chosen, axis=0) - audited[enough]) / spread
    return scores


def scores_beside(losses: np.ndarray, retrained_losses: np.ndarray) -> np.ndarray:
    r"""How much more likely a retrained model finds each example than the model in question does.

    .. math:: z_i = \phi^{retrained}_i - \phi_i

    where phi is the log-odds of exp(-loss), or, if any loss is below 0, as those of a density may be, minus the loss.
    Like a loss, the score is small for a member. The difficulty of an example for any model cancels, which in the loss
    alone can hide a trace or look like one (Watson et al., arXiv 2111.08440).

    Args:
      losses, retrained_losses: `(n,)` losses under the model in question, and under one that never saw the forget set.

    Returns:
      `(n,)`, for `attack`.

    >>> scores_beside(np.array([0.1, 2.0]), np.array([1.0, 2.0])).round(1).tolist()
    [-2.8, 0.0]
    """
    # Two infinite losses are equal.
    same = np.asarray(losses) == np.asarray(retrained_losses)
    retrained, audited = _confidences(retrained_losses, losses)
    return np.where(same, 0.0, retrained - np.where(same, 0.0, audited))


def _confidences(*losses):
    """Phi of each set of losses, read as those of densities, which have no odds, if any loss is below 0."""
    if any(np.any(np.asarray(part) < 0) for part in losses):
        return [-np.asarray(part, np.float64) for part in losses]
    return [log_odds(part) for part in losses]


def checked_shadows(shadows: Any, count: int, params: chex.ArrayTree) -> list[tuple[chex.ArrayTree, np.ndarray]]:
    """The parameters of each shadow model, and which of `count` examples it learned: bools `(count,)`.

    Args:
      shadows: `shadows` of the user's file; None for none.
      count: Number of examples in the data.
      params: Parameters of the original model, whose structure and shapes the others must have.

    Raises:
      ValueError: For anything but pairs of parameters and positions in the data.
    """
    wanted = "expected a list of pairs of parameters and the positions in the data that they were trained on"
    if shadows is not None and not isinstance(shadows, Iterable):
        raise ValueError(f"shadows: got {type(shadows).__name__}, {wanted}")
    found = []
    for number, shadow in enumerate(() if shadows is None else shadows):
        if not isinstance(shadow, tuple) or len(shadow) != 2:
            raise ValueError(f"shadows: got {type(shadow).__name__} as number {number}, {wanted}")
        check_same_shapes(f"shadows, number {number}", shadow[0], "params", params)
        ids = np.asarray(shadow[1])
        if not ids.size:
            raise ValueError(f"shadows: got no positions as number {number}, {wanted}")
        if ids.ndim != 1 or ids.dtype.kind not in "iu" or not 0 <= ids.min() <= ids.max() < count:
            raise ValueError(f"shadows: got positions of number {number} outside of the data, {wanted}")
        found.append((shadow[0], np.isin(np.arange(count), ids)))
    return found
