"""The Frechet distance between two sets of features."""

import numpy as np


def frechet_distance(features: np.ndarray, others: np.ndarray) -> float:
    r"""The Frechet distance between the Gaussians of two sets of features (Dowson & Landau 1982).

    .. math:: d = \lVert \mu - \mu' \rVert^2 + \mathrm{tr}\left(C + C' - 2 (C C')^{1/2}\right)

    With the features of a classifier trained for the purpose, as in this library, it is not the FID, which uses one
    particular Inception network. Values from different classifiers, or from different numbers of samples, cannot be
    compared. With few samples it is too large; the distance between two sets of real images is its floor.

    Args:
      features, others: `(n, d)` and `(m, d)`, with more than one row each.

    Returns:
      The distance, at least 0.

    Raises:
      ValueError: For other shapes, or features that are not finite.

    >>> points = np.random.default_rng(0).normal(size=(500, 3))
    >>> round(frechet_distance(points, points + np.array([2.0, 0.0, 0.0])), 6)
    4.0
    """
    features, others = np.asarray(features), np.asarray(others)
    for name, found in (("features", features), ("others", others)):
        if np.ndim(found) != 2 or len(found) < 2:
            raise ValueError(f"{name}: got shape {np.shape(found)}, expected (n, d) with n of at least 2")
        if not np.isfinite(found).all():
            raise ValueError(f"{name}: got features that are not finite, expected numbers")
    if features.shape[1] != others.shape[1]:
        raise ValueError(f"others: got {others.shape[1]} features, expected {features.shape[1]} as in features")
    first, second = (np.atleast_2d(np.cov(np.asarray(part, np.float64), rowvar=False)) for part in (features, others))
    # The symmetric product has the same trace and no complex root, and allows features that are always 0.
    scales, axes = np.linalg.eigh(first)
    root = axes * np.sqrt(np.maximum(scales, 0))
    values = np.linalg.eigvalsh(root.T @ second @ root)
    shift = np.mean(features, axis=0, dtype=np.float64) - np.mean(others, axis=0, dtype=np.float64)
    trace = np.trace(first) + np.trace(second) - 2 * np.sum(np.sqrt(np.maximum(values, 0)))
    return max(float(np.sum(shift**2) + trace), 0.0)
