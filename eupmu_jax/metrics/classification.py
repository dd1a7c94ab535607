"""UA, RA, TA, MIA and their average gap to a retrained model, as SalUn (ICLR 2024) defines them."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from eupmu_jax.data import Dataset, Split
from eupmu_jax.metrics.membership import FEATURES, SHADOW_SIZE, features, svc_attack
from eupmu_jax.metrics.probabilities import checked, log_probabilities, of_label

GAP_METRICS = ("UA", "RA", "TA", "MIA")


def accuracy(logits: ArrayLike, labels: ArrayLike) -> float:
    """Percentage of rows of `logits` `(N, C)` whose largest entry is at `labels` `(N,)`; ties go to the lower class.

    NaN if any logit is NaN; otherwise argmax would return the first NaN, and a diverged model would seem to predict
    class 0. Raises `ValueError` for labels that are not classes, as do the next two functions.

    >>> accuracy(np.array([[2.0, 1.0], [0.0, 3.0]]), np.array([0, 0]))
    50.0
    """
    logits, labels = checked(logits, labels)
    return float("nan") if np.isnan(logits).any() else 100 * float(np.mean(np.argmax(logits, axis=-1) == labels))


def mean_loss(logits: ArrayLike, labels: ArrayLike) -> float:
    """Mean cross-entropy in nats, in float64.

    >>> round(mean_loss(np.zeros((3, 10)), np.arange(3)), 4)
    2.3026
    """
    logits, labels = checked(logits, labels)
    return float(-np.mean(of_label(log_probabilities(logits), labels)))


def confidence(logits: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """Softmax probability of the true label, `(N,)`.

    >>> confidence(np.log([[0.75, 0.25]]), np.array([1])).round(4).tolist()
    [0.25]
    """
    logits, labels = checked(logits, labels)
    return np.exp(of_label(log_probabilities(logits), labels))


def kl(logits_p: ArrayLike, logits_q: ArrayLike) -> float:
    """Mean over examples of KL(p || q) = sum_k p_k (log p_k - log q_k), in nats.

    Take p from the unlearned and q from the retrained model, on the forget set and on the test set. KL(unlearned ||
    retrained) is the direction in which Golatkar et al. (CVPR 2020) define forgetting. It weights by the unlearned
    model's probabilities: an answer that it still gives counts more the less likely the retrained model finds it. The
    reverse direction is hardly affected by such an answer, and mostly by places where the unlearned model is sharper.

    A second retrained model, from another seed, gives the value to expect of perfect unlearning; it is not 0.

    Args:
      logits_p, logits_q: `(N, C)` on the same examples, in the same order.

    Returns:
      A number of at least 0, computed in float64; infinite only if q is 0 through a logit of -inf where p is not, and
      NaN if a logit is NaN.

    Raises:
      ValueError: If the shapes differ.

    Example:
      >>> round(kl(np.log([[0.5, 0.5]]), np.log([[0.25, 0.75]])), 4)
      0.1438
    """
    log_p, log_q = log_probabilities(logits_p), log_probabilities(logits_q)
    if log_p.shape != log_q.shape:
        raise ValueError(f"logits_q: got shape {log_q.shape}, expected that of logits_p, {log_p.shape}")
    p = np.exp(log_p)
    with np.errstate(invalid="ignore"):
        terms = np.where(p == 0, 0.0, p * (log_p - log_q))
    # Rounding can take the sum for two equal rows below 0.
    return float(np.mean(np.maximum(terms.sum(axis=-1), 0.0)))


def evaluate(
    train_logits: ArrayLike,
    test_logits: ArrayLike,
    dataset: Dataset,
    split: Split,
    seed: int,
    shadow_size: int = SHADOW_SIZE,
    attacks: Sequence[str] = FEATURES,
) -> dict:
    """All metrics of one model.

    Args:
      train_logits: `(N, C)` for the whole training set, without augmentation.
      test_logits: `(M, C)` for the test set.
      dataset: The data.
      split: The split into forget and retain set.
      seed, shadow_size: For the attacks; see `svc_attack`.
      attacks: Features to attack in addition to the confidence; each attack takes about as long as the first.

    Returns:
      UA = 100 - accuracy on the forget set; RA, TA = accuracy on the retain and the test set; `mia`, the MIA efficacy
      for each feature, and MIA, that for the confidence; `retain_loss`, `forget_loss` and `test_loss`, mean
      cross-entropies over the whole sets. If a class was forgotten, TA, the attacks and `test_loss` leave it out of the
      test set, as SalUn does, and `test_UA` is 100 - accuracy on its test examples, which the model never saw.

    Raises:
      ValueError: For an unknown attack, a split with an example on both sides, or a test set without examples of the
        forgotten class or without any others.

    >>> from eupmu_jax import data
    >>> digits = data.load("digits", seed=0)
    >>> some = data.split(digits.train_labels, "random:10%", num_classes=10, seed=0)
    >>> sure = [10.0 * np.eye(10)[labels] for labels in (digits.train_labels, digits.test_labels)]
    >>> figures = evaluate(*sure, digits, some, seed=0, attacks=())
    >>> [figures[name] for name in ("UA", "RA", "TA")]
    [0.0, 100.0, 100.0]
    """
    train_logits, test_logits = np.asarray(train_logits), np.asarray(test_logits)
    forget, retain = split.forget_ids, split.retain_ids
    if len(both := np.intersect1d(forget, retain)):
        raise ValueError(f"split: got example {both[0]} on both sides, expected each to be forgotten or retained")
    tested = np.ones(len(dataset.test_labels), bool)
    if split.forget_class is not None:
        tested = dataset.test_labels != split.forget_class
        if tested.all() or not tested.any():
            raise ValueError(
                f"dataset: got {np.sum(~tested)} of {len(tested)} test examples of the forgotten class "
                f"{split.forget_class}, expected at least one of it and one of another"
            )
    train_labels, test_labels = dataset.train_labels, dataset.test_labels
    members = features(train_logits[retain], train_labels[retain])
    non_members = features(test_logits[tested], test_labels[tested])
    targets = features(train_logits[forget], train_labels[forget])
    mia = {
        name: svc_attack(name, members, non_members, targets, seed, shadow_size)
        for name in dict.fromkeys(("confidence", *attacks))
    }
    figures = {
        "UA": 100 - accuracy(train_logits[forget], train_labels[forget]),
        "RA": accuracy(train_logits[retain], train_labels[retain]),
        "TA": accuracy(test_logits[tested], test_labels[tested]),
        "MIA": mia["confidence"],
        "mia": mia,
        "retain_loss": mean_loss(train_logits[retain], train_labels[retain]),
        "forget_loss": mean_loss(train_logits[forget], train_labels[forget]),
        "test_loss": mean_loss(test_logits[tested], test_labels[tested]),
    }
    if split.forget_class is not None:
        figures["test_UA"] = 100 - accuracy(test_logits[~tested], test_labels[~tested])
    return figures


def average_gap(figures: dict, retrained: dict) -> float:
    """Mean absolute difference of UA, RA, TA and MIA from those of the model retrained with the same seed and split.

    Compute it for each seed and average the gaps; the gap between averages is smaller. Raises `ValueError` if one of
    the figures is missing.

    >>> figures = {"UA": 5.0, "RA": 100.0, "TA": 94.0, "MIA": 13.0}
    >>> average_gap(figures, figures | {"UA": 7.0, "MIA": 11.0})
    1.0
    """
    for name, given in (("figures", figures), ("retrained", retrained)):
        if lacking := [metric for metric in GAP_METRICS if given.get(metric) is None]:
            raise ValueError(f"{name}: got no {', '.join(lacking)}, expected {', '.join(GAP_METRICS)}")
    return float(np.mean([abs(figures[name] - retrained[name]) for name in GAP_METRICS]))
