"""Membership inference attacks."""

import numpy as np

SHADOW_SIZE = 10_000


def svc_confidence_attack(
    retain: np.ndarray, test: np.ndarray, forget: np.ndarray, seed: int = 0, shadow_size: int = SHADOW_SIZE
) -> float:
    """MIA efficacy: the percentage of forgotten examples that an attack takes for examples never trained on.

    A support vector classifier (RBF kernel, C = 3, gamma = 1 / number of features) learns to tell retained examples
    (members) from test examples (non-members), equally many of each, by the model's confidence in the true label, and
    is applied to the forget set. The aim is not 100 but the retrained model's value.

    Args:
      retain, test, forget: `(n,)` confidences in [0, 1].
      seed: Chooses which examples train the attack where there are more than needed.
      shadow_size: At most so many of each train the attack; its time grows with the square.

    Returns:
      A percentage. Where the confidences cannot be told apart the classifier answers with one side for all.
    """
    from sklearn.svm import SVC

    rng = np.random.default_rng(seed)
    size = min(len(retain), len(test), shadow_size)
    members, strangers = (rng.permutation(values)[:size] for values in (retain, test))
    features = np.concatenate([members, strangers])[:, None]
    attack = SVC(C=3, gamma="auto", kernel="rbf").fit(features, np.repeat([1, 0], size))
    return 100 * float(np.mean(attack.predict(np.asarray(forget)[:, None]) == 0))
