"""How strongly each training example is memorised, from shadow models."""

import numpy as np
from numpy.typing import ArrayLike


def memorisation_scores(probabilities: ArrayLike, members: ArrayLike) -> np.ndarray:
    """Memorisation score of every example: how much better models predict it that were trained on it.

    `score_i = mean over s with i in S_s of p_si - mean over s with i not in S_s of p_si`, where S_s is the training set
    of shadow model s and p_si its probability of the true label of example i. The paper instead uses 1 or 0 for whether
    the label is predicted, which may be passed too. A score of 1 means memorised, 0 means predicted equally well
    without it.

    The estimate is unbiased if the sets S_s were drawn independently of the other randomness of training. Its standard
    error is sqrt(v_in / n_in + v_out / n_out), with v the variance among models: at most 1 / sqrt(S) with half the
    models in and half out. The largest of many noisy scores are biased upwards, more so with fewer models.

    Args:
      probabilities: (S, N) in [0, 1], for S models and N examples.
      members: (S, N) bool, whether example i was in the training set of model s.

    Returns:
      (N,) float64 in [-1, 1].

    Raises:
      ValueError: If the shapes differ, `members` is not boolean, a probability is NaN or not in [0, 1], or an example
        was in the training set of all models or of none, which leaves its score undefined.

    Source: Feldman and Zhang, "What neural networks memorize and why", NeurIPS 2020, section 2 and algorithm 1.
    Cost: two passes over the (S, N) arrays, which is negligible next to training S models.

    >>> probabilities = [[0.9, 0.8], [1.0, 0.2], [0.1, 0.9], [0.3, 0.1]]
    >>> members = [[True, True], [True, False], [False, True], [False, False]]
    >>> memorisation_scores(probabilities, members).round(2).tolist()
    [0.75, 0.7]
    """
    probabilities, members = np.asarray(probabilities, np.float64), np.asarray(members)
    if probabilities.ndim != 2 or members.shape != probabilities.shape:
        raise ValueError(
            f"members: got shape {members.shape} for probabilities of shape {probabilities.shape}, expected (S, N) for "
            "both"
        )
    if members.dtype != bool:
        raise ValueError(f"members: got dtype {members.dtype}, expected bool")
    # NaN compares false with everything.
    if not ((probabilities >= 0) & (probabilities <= 1)).all():
        raise ValueError(
            "probabilities: got values outside [0, 1] or not a number, expected probabilities of the true label"
        )
    inside = members.sum(axis=0)
    outside = len(members) - inside
    undefined = np.flatnonzero((inside == 0) | (outside == 0))
    if undefined.size:
        raise ValueError(
            f"members: got {undefined.size} examples that were in all or in none of {len(members)} training sets, the "
            f"first of them {undefined[0]}; expected each in at least one and out of at least one: train more models, "
            "or draw the sets in complementary pairs"
        )
    within = np.where(members, probabilities, 0).sum(axis=0) / inside
    without = np.where(members, 0, probabilities).sum(axis=0) / outside
    return within - without
