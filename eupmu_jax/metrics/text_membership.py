"""Min-k %, a membership attack on texts, and PrivLeak, which compares its success with that on a retrained model."""

import numpy as np
from numpy.typing import ArrayLike

from eupmu_jax._stack.checks import check_number
from eupmu_jax.metrics.lira import attack_figures


def min_k(nll: ArrayLike, mask: ArrayLike, share: float = 0.4) -> np.ndarray:
    """Mean log-probability of the least likely tokens of each text, `(n,)`; higher for texts that were trained on.

    The number of these tokens is a share of all, rounded down but at least one (Shi et al. 2024, arXiv 2310.16789).
    MUSE uses 40 %. Implementations that negate the score rate how likely a text was *not* trained on.

    Args:
      nll: -log p of each token, `(n, T)`.
      mask: Which tokens count, `(n, T)`.
      share: Fraction of the tokens, in (0, 1].

    Raises:
      ValueError: For other shapes, a share outside (0, 1], a text without tokens or a loss that is not finite.

    >>> min_k([[1.0, 4.0, 2.0, 9.0]], [[1, 1, 1, 0]], share=0.7).tolist()
    [-3.0]
    """
    losses, counted = np.asarray(nll, np.float64), np.asarray(mask).astype(bool)
    if counted.shape != losses.shape or losses.ndim != 2:
        raise ValueError(f"mask: got shape {counted.shape} for nll of {losses.shape}, expected (n, T) for both")
    check_number("share", share, above=0, most=1)
    if not (present := counted.any(axis=1)).all():
        raise ValueError(f"mask: got no token in text {np.argmin(present)}, expected at least one in each")
    if not np.isfinite(losses[counted]).all():
        raise ValueError("nll: got NaN or infinity, expected finite numbers")
    largest = -np.sort(-np.where(counted, losses, -np.inf), axis=1)
    # The binary rounding of a share such as 0.7 must not cost a token.
    counts = np.maximum((share * counted.sum(axis=1) + 1e-6).astype(int), 1)
    kept = np.arange(losses.shape[1]) < counts[:, None]
    return -np.where(kept, largest, 0).sum(axis=1) / counts


def separation(forget: ArrayLike, held_out: ArrayLike) -> float:
    """AUC of scores that separate forgotten texts from texts that were never seen.

    It is 1 if every forgotten text scores higher, 0.5 if they cannot be separated, and lower if forgotten texts score
    lower than unseen ones.

    Args:
      forget, held_out: `min_k` of both sets, `(n,)` and `(m,)`, or another score that is higher for members.

    Raises:
      ValueError: For an empty set, or a score that is not finite.

    >>> separation([3.0, 2.0], [1.0, 2.5])
    0.75
    """
    sets = [np.asarray(scores, np.float64) for scores in (forget, held_out)]
    for name, scores in zip(("forget", "held_out"), sets, strict=True):
        if not scores.size:
            raise ValueError(f"{name}: got no scores, expected at least one")
        if not np.isfinite(scores).all():
            raise ValueError(f"{name}: got scores that are not finite, expected numbers")
    truth = np.repeat([1, 0], [scores.size for scores in sets])
    return attack_figures(np.concatenate([scores.ravel() for scores in sets]), truth)["AUC"]


def privleak(auc: float, retrained_auc: float) -> float:
    r"""PrivLeak of MUSE, in % (Shi et al. 2024, arXiv 2407.06460).

    .. math:: 100\, \frac{A - A_0}{A_0}, \quad A = 1 - \mathrm{AUC}

    where the AUC is the `separation` of the unlearned model, and :math:`A_0` comes from the retrained one. The goal is
    0. Far below 0 the forgotten texts still look like members; far above, they look less likely than unseen texts,
    which leaks as well.

    Args:
      auc, retrained_auc: `separation` of `min_k` scores, in [0, 1].

    Raises:
      ValueError: For values outside [0, 1], or a retrained model with an AUC of 1, which leaves PrivLeak undefined.

    >>> privleak(1.0, 0.5), privleak(0.5, 0.5), privleak(0.25, 0.5)
    (-100.0, 0.0, 50.0)
    """
    for name, value in (("auc", auc), ("retrained_auc", retrained_auc)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}: got {value}, expected a number from 0 to 1")
    if retrained_auc == 1:
        raise ValueError(
            "retrained_auc: got 1, expected less: a retrained model cannot recognise forgotten texts as members"
        )
    return 100 * (retrained_auc - auc) / (1 - retrained_auc)
