"""U-LiRA: a per-example membership attack by a likelihood ratio (Hayes et al., arXiv 2403.01218).

Shadow models sample two worlds. In one the example was in the training set and the method under test then removed it
(*unlearned*); in the other the model was trained without it (*out*). Each world gives a Gaussian of the statistic phi
for each example, and an attacked model is scored by how much more likely its phi is in the first world. Perfect
unlearning makes the worlds alike: the AUC is 0.5, and the TPR equals the FPR. The cost is S1 trainings with unlearning
and S2 without; 16 to 32 of each are enough with `pooled_variance`, 64 or more without.

    phi = lira_statistic(logits, labels)                       for each shadow model: (N,)
    attack_figures(*leave_pair_out(unlearned, out))            attacks every shadow model in turn
    attack_figures(u_lira(unlearned, out, phi), truth)         attacks another model
"""

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import logit
from scipy.stats import norm

from eupmu_jax.metrics.probabilities import checked, log_complements, log_probabilities, of_label

# Confidences are clipped to [CLIP, 1 - CLIP].
CLIP = 1e-7
# Keeps the ratio finite where all shadow models give the same phi, as they do where it is clipped.
VARIANCE_FLOOR = 1e-6


def lira_statistic(logits: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """The statistic phi = log p_y - log(1 - p_y), with p_y clipped to [1e-7, 1 - 1e-7].

    Over models it is close to Gaussian, unlike p_y and the loss (Carlini et al., arXiv 2112.03570).

    Args:
      logits: `(N, C)`, C > 1, without augmentation.
      labels: `(N,)` ints in [0, C).

    Returns:
      `(N,)` float64 within +-16.2.

    Raises:
      ValueError: For other shapes or labels.

    Example:
      >>> lira_statistic(np.array([[3.0, 0.0], [0.0, 99.0]]), np.array([0, 1])).round(2).tolist()
      [3.0, 16.12]
    """
    logits, labels = checked(logits, labels)
    log_p = log_probabilities(logits)
    largest = logit(1 - CLIP)
    return np.clip(of_label(log_p, labels) - of_label(log_complements(log_p), labels), -largest, largest)


def log_odds(losses: ArrayLike) -> np.ndarray:
    r"""Log-odds of a loss that is a negative log-likelihood: log p - log(1 - p) for p = exp(-loss).

    As `lira_statistic`, but without a lower bound, since the losses of some tasks are large.

    >>> log_odds(np.array([np.log(2.0), 0.0])).round(2).tolist()
    [0.0, 16.12]
    """
    losses = np.clip(np.asarray(losses, np.float64), CLIP, None)
    return -losses - np.log(-np.expm1(-losses))


def u_lira(unlearned: ArrayLike, out: ArrayLike, target: ArrayLike, *, pooled_variance: bool = False) -> np.ndarray:
    """The log-likelihood ratio log N(phi; m_unlearned, v_unlearned) - log N(phi; m_out, v_out) of each example.

    Args:
      unlearned: `(S1, N)`, phi of N examples under S1 > 1 shadow models that learned and unlearned them.
      out: `(S2, N)`, phi under S2 > 1 shadow models that never saw them.
      target: `(N,)` or `(..., N)`, phi under the attacked models.
      pooled_variance: Whether to use one variance for each world, the mean over its examples, instead of one for each
        example and world. Use it with few shadow models, whose individual variances are mostly noise.

    Returns:
      The scores, shaped like `target`; above 0 the example is more likely unlearned than never seen.

    Raises:
      ValueError: If a world has fewer than two shadow models, if shapes do not match, or for a phi that is not finite.

    Example:
      >>> u_lira(np.array([[4.0], [6.0]]), np.array([[0.0], [2.0]]), np.array([5.0])).round(2).tolist()
      [4.0]
    """
    unlearned, out, target = (np.asarray(values, np.float64) for values in (unlearned, out, target))
    _check_worlds(unlearned, out, 2)
    if target.ndim == 0 or target.shape[-1] != unlearned.shape[1]:
        raise ValueError(f"target: got shape {target.shape}, expected (..., {unlearned.shape[1]}) as in unlearned")
    if not np.isfinite(target).all():
        raise ValueError("target: got phi that is not finite, expected values of lira_statistic")
    likelihoods = []
    for world in (unlearned, out):
        variance = np.var(world, axis=0, ddof=1)
        if pooled_variance:
            variance = np.mean(variance)
        likelihoods.append(norm.logpdf(target, np.mean(world, axis=0), np.sqrt(variance + VARIANCE_FLOOR)))
    return likelihoods[0] - likelihoods[1]


def leave_pair_out(
    unlearned: ArrayLike, out: ArrayLike, *, pooled_variance: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Attacks the shadow models themselves: each pair, one from each world, is attacked with all the others.

    Both models of a pair are scored by the same Gaussians, which are fitted without them, so worlds that are alike have
    the same mean score. If only one model were left out at a time, the smaller fit would reveal its world.

    Args:
      unlearned, out, pooled_variance: As in `u_lira`, with at least three shadow models in each world.

    Returns:
      `(scores, truth)` for `attack_figures`, both `(2, P, N)` with P = min(S1, S2) pairs; `truth` is 1 in row 0, for
      unlearned examples, and 0 in row 1, for those never seen. Shadow models beyond P are never attacked.

    Raises:
      ValueError: As in `u_lira`, and for fewer than three shadow models.

    Example:
      >>> worlds = np.random.default_rng(0).normal(size=(2, 16, 500))
      >>> scores, truth = leave_pair_out(*worlds)
      >>> scores.shape, round(attack_figures(scores, truth)["AUC"], 1)
      ((2, 16, 500), 0.5)
    """
    unlearned, out = np.asarray(unlearned, np.float64), np.asarray(out, np.float64)
    _check_worlds(unlearned, out, 3)
    pairs = range(min(len(unlearned), len(out)))
    scores = [
        u_lira(
            np.delete(unlearned, i, axis=0),
            np.delete(out, i, axis=0),
            np.stack([unlearned[i], out[i]]),
            pooled_variance=pooled_variance,
        )
        for i in pairs
    ]
    stacked = np.stack(scores, axis=1)
    return stacked, np.broadcast_to(np.array([1, 0])[:, None, None], stacked.shape)


def attack_figures(scores: ArrayLike, truth: ArrayLike) -> dict[str, float]:
    """How well scores distinguish unlearned examples from those never seen.

    Args:
      scores: From `u_lira` or `leave_pair_out`, of any shape; one threshold is used for all examples and models.
      truth: Like `scores`, 1 or True for unlearned and 0 for never seen.

    Returns:
      Fractions in [0, 1], not percentages: `AUC`; `accuracy`, the balanced accuracy of the threshold 0; `TPR at 1% FPR`
      and `TPR at 0.1% FPR`, the best over all thresholds within that FPR. With fewer than 1,000 examples never seen,
      0.1 % allows no false positive at all, so the value is noisier.

    Raises:
      ValueError: If the shapes differ, a score is not finite, or one of the two classes is missing.

    Example:
      >>> attack_figures(np.array([2.0, 0.5, -0.5, -2.0]), np.array([1, 0, 1, 0]))
      {'AUC': 0.75, 'accuracy': 0.5, 'TPR at 1% FPR': 0.5, 'TPR at 0.1% FPR': 0.5}
    """
    from sklearn.metrics import balanced_accuracy_score, roc_auc_score, roc_curve

    scores, truth = np.asarray(scores, np.float64), np.asarray(truth)
    if scores.shape != truth.shape:
        raise ValueError(f"truth: got shape {truth.shape}, expected that of scores, {scores.shape}")
    scores, truth = scores.ravel(), truth.ravel()
    if set(np.unique(truth)) != {0, 1}:
        raise ValueError(f"truth: got the values {np.unique(truth).tolist()}, expected both 0 and 1")
    if not np.isfinite(scores).all():
        raise ValueError("scores: got NaN or infinity, expected finite numbers")
    false_rate, true_rate, _ = roc_curve(truth, scores, drop_intermediate=False)
    best = lambda limit: float(true_rate[np.searchsorted(false_rate, limit, side="right") - 1])
    return {
        "AUC": float(roc_auc_score(truth, scores)),
        "accuracy": float(balanced_accuracy_score(truth, scores > 0)),
        "TPR at 1% FPR": best(0.01),
        "TPR at 0.1% FPR": best(0.001),
    }


def _check_worlds(unlearned, out, least):
    for name, world in (("unlearned", unlearned), ("out", out)):
        if world.ndim != 2 or len(world) < least:
            raise ValueError(
                f"{name}: got shape {world.shape}, expected (S, N) with S of {least} or more shadow models"
            )
        if not np.isfinite(world).all():
            raise ValueError(f"{name}: got phi that is not finite, expected values of lira_statistic")
    if unlearned.shape[1] != out.shape[1]:
        raise ValueError(f"out: got {out.shape[1]} examples, expected {unlearned.shape[1]} as in unlearned")
