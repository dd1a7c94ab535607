"""Log-probabilities of classes from logits, in float64 and accurate even where a softmax saturates."""

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import log_softmax, logsumexp


def log_probabilities(logits: ArrayLike) -> np.ndarray:
    """Log-softmax, `(N, C)` like `logits`; finite for finite logits, however far apart.

    >>> log_probabilities(np.array([[0.0, 2000.0]])).tolist()
    [[-2000.0, 0.0]]
    """
    return log_softmax(np.asarray(logits, np.float64), axis=-1)


def log_complements(log_p: np.ndarray) -> np.ndarray:
    """Logarithms of 1 - p, `(N, C)` like `log_p`; finite for finite logits, even where p rounds to 1.

    The largest p of a row is the only one that can come near 1, and its complement is the sum of the others.

    >>> log_complements(np.array([[np.log(0.75), np.log(0.25)], [0.0, -2000.0]])).round(4).tolist()
    [[-1.3863, -0.2877], [-2000.0, -0.0]]
    """
    largest = np.argmax(log_p, axis=-1)[..., None]
    others = log_p.copy()
    np.put_along_axis(others, largest, -np.inf, axis=-1)
    complements = np.log1p(-np.exp(others))
    np.put_along_axis(complements, largest, logsumexp(others, axis=-1, keepdims=True), axis=-1)
    return complements


def of_label(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The entry of each row of `values` `(N, C)` at its label, `(N,)`.

    >>> of_label(np.array([[0.9, 0.1], [0.4, 0.6]]), np.array([0, 1])).tolist()
    [0.9, 0.6]
    """
    return np.take_along_axis(values, np.asarray(labels)[:, None], axis=-1)[:, 0]


def checked(logits: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Both as NumPy arrays; raises `ValueError` unless they are `(N, C)` with C > 1 and `(N,)` classes."""
    logits, labels = np.asarray(logits), np.asarray(labels)
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(f"logits: got shape {logits.shape}, expected (N, C) with at least two classes")
    if labels.shape != logits.shape[:1]:
        raise ValueError(f"labels: got shape {labels.shape}, expected {logits.shape[:1]}, one for each row of logits")
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels: got {labels.dtype}, expected ints")
    if labels.size and not 0 <= labels.min() <= labels.max() < logits.shape[1]:
        raise ValueError(f"labels: got {labels.min()} to {labels.max()}, expected 0 to {logits.shape[1] - 1}")
    return logits, labels
