"""Which training examples to forget and which to retain."""

import hashlib
import re
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

_CLASS = re.compile(r"class:(-?[0-9]+)")
_RANDOM = re.compile(r"random:(-?[0-9]+(?:\.[0-9]+)?)%")


class Split(NamedTuple):
    """A partition of a training set.

    Attributes:
      forget_ids: (F,) int64, sorted indices into the training set.
      retain_ids: (R,) int64, sorted indices of all other examples.
      forget_class: the class that was forgotten as a whole, None if the examples were drawn at random.
    """

    forget_ids: np.ndarray
    retain_ids: np.ndarray
    forget_class: int | None


def split(labels: ArrayLike, forget: str, *, num_classes: int, seed: int) -> Split:
    """Splits a training set into a forget set and a retain set, neither of them empty.

    Args:
      labels: (N,) int class labels of the training set.
      forget: "class:3" for every example of class 3, or "random:10%" for that share of all examples, drawn without
        replacement and rounded to a whole number of them; "random:2.5%" will do too.
      num_classes: number of classes.
      seed: chooses the random examples; a class has no choice to make.

    Returns:
      The split, the same for the same arguments.

    Raises:
      ValueError: if the labels are not one-dimensional, `forget` is malformed, names a class outside
        [0, num_classes) or a percentage outside (0, 100), or selects no example or every example.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1:
        raise ValueError(f"labels: got shape {labels.shape}, want (N,) class indices")
    forget_class = None
    if match := _CLASS.fullmatch(forget):
        forget_class = int(match[1])
        if not 0 <= forget_class < num_classes:
            raise ValueError(f"forget: got {forget!r}, want a class from 0 to {num_classes - 1}")
        forgotten = labels == forget_class
    elif match := _RANDOM.fullmatch(forget):
        percentage = float(match[1])
        if not 0 < percentage < 100:
            raise ValueError(f"forget: got {forget!r}, want a percentage above 0 and below 100")
        forgotten = np.zeros(labels.size, bool)
        count = round(labels.size * percentage / 100)
        forgotten[np.random.default_rng(seed).choice(labels.size, count, replace=False)] = True
    else:
        raise ValueError(f"forget: got {forget!r}, want 'class:<index>' or 'random:<number>%'")
    if not forgotten.any():
        raise ValueError(f"forget: got {forget!r}, which is none of the {labels.size} examples; want at least one")
    if forgotten.all():
        raise ValueError(f"forget: got {forget!r}, which is all {labels.size} examples; want at least one retained")
    return Split(np.flatnonzero(forgotten), np.flatnonzero(~forgotten), forget_class)


def digest(split: Split) -> str:
    """Returns the SHA-256 of the split's indices in hex, the same on every platform."""
    ids = hashlib.sha256()
    for part in (split.forget_ids, split.retain_ids):
        # The length keeps a boundary between the two sets from moving unseen.
        ids.update(len(part).to_bytes(8, "little"))
        ids.update(np.asarray(part, "<i8").tobytes())
    return ids.hexdigest()
