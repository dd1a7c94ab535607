"""MIA efficacy: a population attack on five features of a classifier's output, as SalUn (ICLR 2024) reports it.

The attack is trained on retain examples (members) and test examples (non-members), and asks on which side a forgotten
example falls. It treats all examples alike, so it overestimates the privacy of each: `metrics.lira` is stronger.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike
from scipy.spatial.distance import cdist
from scipy.special import entr

from eupmu_jax._stack.checks import check_int
from eupmu_jax.metrics.probabilities import checked, log_complements, log_probabilities, of_label

SHADOW_SIZE = 10_000
FEATURES = ("correctness", "confidence", "entropy", "modified_entropy", "probabilities")
# The value of a random guess: the result when the attack's training data carry no information.
UNDECIDED = 50.0


def features(logits: ArrayLike, labels: ArrayLike) -> dict[str, np.ndarray]:
    """The features that the attacks use, for each example with probabilities p and true label y.

    - `correctness`: 1.0 if the largest logit is at y, else 0.0; ties go to the lower class.
    - `confidence`: p_y.
    - `entropy`: -sum_k p_k log p_k, which does not depend on the label.
    - `modified_entropy`: -(1 - p_y) log p_y - sum_{k != y} p_k log(1 - p_k), which tends to 0 for a confident correct
      answer and grows without bound for a confident wrong one (Song and Mittal, USENIX Security 2021). The evaluation
      code that unlearning papers share uses log p_k in the sum and mixes up the labels of a batch; this is the quantity
      as defined.
    - `probabilities`: p.

    Args:
      logits: `(N, C)`, C > 1.
      labels: `(N,)` ints in [0, C).

    Returns:
      A dict with the keys of `FEATURES`; float64, all `(N,)` except the probabilities, `(N, C)`. All are finite for
      finite logits.

    Raises:
      ValueError: For other shapes or labels.

    Example:
      >>> sure = features(np.array([[8.0, 0.0], [8.0, 0.0]]), np.array([0, 1]))
      >>> {name: np.round(sure[name], 3).tolist() for name in ("correctness", "entropy", "modified_entropy")}
      {'correctness': [1.0, 0.0], 'entropy': [0.003, 0.003], 'modified_entropy': [0.0, 15.995]}
    """
    logits, labels = checked(logits, labels)
    log_p = log_probabilities(logits)
    log_rest, p = log_complements(log_p), np.exp(log_p)
    others = p * log_rest
    np.put_along_axis(others, labels[:, None], 0.0, axis=-1)
    return {
        "correctness": (np.argmax(logits, axis=-1) == labels).astype(np.float64),
        "confidence": np.exp(of_label(log_p, labels)),
        "entropy": entr(p).sum(axis=-1),
        "modified_entropy": -np.exp(of_label(log_rest, labels)) * of_label(log_p, labels) - others.sum(axis=-1),
        "probabilities": p,
    }


def svc_attack(
    feature: str,
    members: Mapping[str, np.ndarray],
    non_members: Mapping[str, np.ndarray],
    targets: Mapping[str, np.ndarray],
    seed: int = 0,
    shadow_size: int = SHADOW_SIZE,
) -> float:
    """MIA efficacy for one feature: the percentage of targets that the attack classifies as never trained on.

    A support vector classifier (RBF kernel, C = 3, gamma = 1 / number of features) learns to separate members from
    non-members, in equal numbers, and is applied to the targets. The goal is not 100 but the retrained model's value.
    If the targets are drawn like the non-members, that is the fraction of unseen examples that the attack gets right.

    Args:
      feature: One of `FEATURES`.
      members, non_members, targets: `features` of the retain, the test and the forget set.
      seed: Selects the examples that train the attack if there are more than needed.
      shadow_size: The most members and the most non-members that train the attack, limited by the smaller set. Time
        grows with its square, to several seconds for each feature at SalUn's 10,000.

    Returns:
      A percentage. It is 50 if all examples that train the attack are alike, as with `correctness` when all are
      correct: the classifier would assign all targets to the same side, and which one would be an accident of their
      number. It is NaN if a feature is not finite, as for a diverged model.

    Raises:
      ValueError: For an unknown feature, an empty set or a shadow size below 1.

    Example:
      >>> right, wrong = np.eye(2)[[0, 1]] * 9, np.eye(2)[[1, 0]] * 9
      >>> seen, unseen = features(right, np.array([0, 1])), features(wrong, np.array([0, 1]))
      >>> svc_attack("confidence", seen, unseen, unseen), svc_attack("confidence", seen, seen, unseen)
      (100.0, 50.0)
    """
    if feature not in FEATURES:
        raise ValueError(f"feature: got {feature!r}, expected one of {', '.join(FEATURES)}")
    return _attack(members[feature], non_members[feature], targets[feature], seed, shadow_size)


def svc_confidence_attack(
    retain: ArrayLike, test: ArrayLike, forget: ArrayLike, seed: int = 0, shadow_size: int = SHADOW_SIZE
) -> float:
    """`svc_attack` on the confidence, the feature that papers report as MIA.

    Args:
      retain, test, forget: `(n,)` confidences in [0, 1].
      seed, shadow_size: As in `svc_attack`.

    Returns:
      A percentage, or 50 or NaN as in `svc_attack`.

    Example:
      >>> svc_confidence_attack(np.full(9, 0.99), np.full(9, 0.3), np.array([0.98, 0.31, 0.32, 0.29]))
      75.0
    """
    return _attack(retain, test, forget, seed, shadow_size)


def _attack(members, non_members, targets, seed, shadow_size):
    from sklearn.svm import SVC
    from sklearn.utils import gen_batches

    sets = {"members": members, "non_members": non_members, "targets": targets}
    for name, values in sets.items():
        if len(values) == 0:
            raise ValueError(f"{name}: got no examples, expected at least one")
    check_int("shadow_size", shadow_size, 1, static=True)
    if not all(np.isfinite(values).all() for values in sets.values()):
        return float("nan")
    rng = np.random.default_rng(seed)
    size = min(len(members), len(non_members), shadow_size)
    shadows = np.concatenate([rng.permutation(values)[:size] for values in (members, non_members)])
    if (shadows == shadows[0]).all():
        return UNDECIDED
    as_rows = lambda values: np.reshape(values, (len(values), -1))
    # Each distinct value once: correctness has only two.
    values, counts = np.unique(as_rows(targets), axis=0, return_counts=True)
    gamma = 1 / values.shape[1]
    attack = SVC(C=3, gamma=gamma, kernel="rbf").fit(as_rows(shadows), np.repeat([1, 0], size))
    # Same result as attack.predict in a third of its time, which dominated the evaluation of a model.
    margins = [
        np.exp(-gamma * cdist(values[batch], attack.support_vectors_, "sqeuclidean")) @ attack.dual_coef_[0]
        for batch in gen_batches(len(values), 200)
    ]
    return 100 * float(counts[np.concatenate(margins) < -attack.intercept_[0]].sum() / len(targets))
