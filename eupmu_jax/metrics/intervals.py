"""Whether two methods differ over seeds: bootstrap intervals of their paired differences."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

RESAMPLES = 20_000
# Up to so many, all possible resamples are taken instead: those of six pairs.
ALL = 6**6


class Interval(NamedTuple):
    """An interval for the mean of differences: `mean`, and `low <= mean <= high`."""

    mean: float
    low: float
    high: float


def paired_interval(a: ArrayLike, b: ArrayLike, *, confidence: float = 0.95, seed: int = 0) -> Interval:
    """Bootstrap interval of the mean of `a - b`, where entry i of both comes from the same seed and split.

    This is the expanded percentile interval (Hesterberg, The American Statistician 69, 2015): quantiles of the means of
    resamples at Phi(-t sqrt(n / (n - 1))) from either end, with t the quantile of Student's distribution for n - 1
    degrees of freedom. The plain percentile interval treats the n values as the population, and for n = 5 covers the
    mean of normal differences in about 84 of 100 cases instead of 95. BCa does no better, as it estimates its
    corrections from the same n values. The expanded interval covers the mean in about 92 cases for n = 5 and 94 for
    n = 10, and in fewer for skewed differences.

    Resampling cannot make up for too few seeds. The interval lies within the range of the differences, and the centre
    of a symmetric distribution lies outside the range of n of its values with probability 2^(1 - n): 6 % for n = 5,
    25 % for n = 3. With fewer than six seeds no method of this kind gives a 95 % interval; show the differences
    themselves.

    Args:
      a, b: `(n,)` figures of two methods, n > 1.
      confidence: Confidence level in (0, 1).
      seed: Seed of the 20,000 resamples of more than six pairs. Of up to six, all resamples are taken, and the result
        does not depend on it.

    Returns:
      The interval. Its width is zero if all differences are equal, which means that the figure did not vary, not that
      it is known exactly.

    Raises:
      ValueError: If the shapes differ, for fewer than two pairs, values that are not finite or a confidence outside
        (0, 1).

    Example:
      >>> interval = paired_interval([3.1, 2.9, 3.4, 3.0, 3.3], [2.0, 2.1, 2.2, 2.0, 2.1])
      >>> [round(end, 2) for end in interval]
      [1.06, 0.84, 1.2]
      >>> paired_interval([1.0, 2.0], [1.0, 2.0])
      Interval(mean=0.0, low=0.0, high=0.0)
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or a.ndim != 1 or len(a) < 2:
        raise ValueError(f"a, b: got shapes {a.shape} and {b.shape}, expected (n,) for both, with n of at least 2")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("a, b: got values that are not finite, expected numbers")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: got {confidence}, expected a number between 0 and 1")
    differences = a - b
    mean = float(np.mean(differences))
    if np.ptp(differences) == 0:
        return Interval(mean, mean, mean)
    n = len(differences)
    tail = stats.norm.cdf(np.sqrt(n / (n - 1)) * stats.t.ppf((1 - confidence) / 2, n - 1))
    if n**n <= ALL:
        draws = np.indices((n,) * n).reshape(n, -1)
    else:
        draws = np.random.default_rng(seed).integers(n, size=(n, RESAMPLES))
    low, high = np.quantile(differences[draws].mean(axis=0), [tail, 1 - tail], method="inverted_cdf")
    return Interval(mean, min(mean, float(low)), max(mean, float(high)))


def tied(a: ArrayLike, b: ArrayLike, *, confidence: float = 0.95, seed: int = 0) -> bool:
    """Whether `paired_interval` contains 0: the seeds do not separate the methods, which does not prove them equal.

    With two or three seeds, differences of the same sign already count as a difference; see the limits given there.

    >>> tied([3.1, 2.9, 3.4, 3.0, 3.3], [2.0, 2.1, 2.2, 2.0, 2.1]), tied([1.0, 2.0], [1.5, 1.5])
    (False, True)
    """
    _, low, high = paired_interval(a, b, confidence=confidence, seed=seed)
    return low <= 0 <= high
