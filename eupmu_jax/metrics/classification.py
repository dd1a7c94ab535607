"""UA, RA, TA, MIA and their average gap to a retrained model, as SalUn (ICLR 2024) defines them."""

import numpy as np
from scipy.special import log_softmax

from eupmu_jax.data import Dataset, Split
from eupmu_jax.metrics.membership import SHADOW_SIZE, svc_confidence_attack

GAP_METRICS = ("UA", "RA", "TA", "MIA")


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Percentage of rows of `logits` `(N, C)` whose largest entry is at `labels` `(N,)`; ties go to the lower class."""
    return 100 * float(np.mean(np.argmax(logits, axis=-1) == labels))


def mean_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean cross-entropy in nats, in float64."""
    return float(-np.mean(_label_log_probabilities(logits, labels)))


def confidence(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Softmax probability of the true label, `(N,)`."""
    return np.exp(_label_log_probabilities(logits, labels))


def evaluate(
    train_logits: np.ndarray,
    test_logits: np.ndarray,
    dataset: Dataset,
    split: Split,
    seed: int,
    shadow_size: int = SHADOW_SIZE,
) -> dict:
    """All figures of one model.

    Args:
      train_logits: `(N, C)` for the whole training set, without augmentation.
      test_logits: `(M, C)` for the test set.
      dataset: The data.
      split: What was to be forgotten.
      seed, shadow_size: Of the attack, see `svc_confidence_attack`.

    Returns:
      UA = 100 - accuracy on the forget set; RA, TA = accuracy on the retain and the test set; MIA, see
      `svc_confidence_attack`; `retain_loss` and `forget_loss`, mean cross-entropies over the whole sets. If a class
      was forgotten, TA and MIA leave it out of the test set, and `test_UA` is 100 - accuracy on it there.
    """
    forget, retain = split.forget_ids, split.retain_ids
    tested = np.ones(len(dataset.test_labels), bool)
    if split.forget_class is not None:
        tested = dataset.test_labels != split.forget_class
    train_confidence = confidence(train_logits, dataset.train_labels)
    test_confidence = confidence(test_logits, dataset.test_labels)
    members, strangers, judged = train_confidence[retain], test_confidence[tested], train_confidence[forget]
    figures = {
        "UA": 100 - accuracy(train_logits[forget], dataset.train_labels[forget]),
        "RA": accuracy(train_logits[retain], dataset.train_labels[retain]),
        "TA": accuracy(test_logits[tested], dataset.test_labels[tested]),
        "MIA": svc_confidence_attack(members, strangers, judged, seed, shadow_size),
        "retain_loss": mean_loss(train_logits[retain], dataset.train_labels[retain]),
        "forget_loss": mean_loss(train_logits[forget], dataset.train_labels[forget]),
    }
    if split.forget_class is not None:
        figures["test_UA"] = 100 - accuracy(test_logits[~tested], dataset.test_labels[~tested])
    return figures


def average_gap(figures: dict, retrained: dict) -> float:
    """Mean absolute difference of UA, RA, TA and MIA to those of the model retrained with the same seed and split."""
    return float(np.mean([abs(figures[name] - retrained[name]) for name in GAP_METRICS]))


def _label_log_probabilities(logits, labels):
    log_probabilities = log_softmax(np.asarray(logits, np.float64), axis=-1)
    return np.take_along_axis(log_probabilities, np.asarray(labels)[:, None], axis=-1)[:, 0]
