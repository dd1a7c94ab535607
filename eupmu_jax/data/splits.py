"""Splits of a training set into examples to forget and examples to retain."""

import hashlib
import json
import os
import re
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from eupmu_jax.data import dataset as datasets

_CLASS = re.compile(r"class:(-?[0-9]+)")
_SHARE = re.compile(r"(random|memorised):(-?[0-9]+(?:\.[0-9]+)?)%")


class Split(NamedTuple):
    """A partition of a training set.

    Attributes:
      forget_ids: (F,) int64, sorted indices into the training set.
      retain_ids: (R,) int64, sorted indices of all other examples.
      forget_class: the class that is forgotten entirely; None if the examples were chosen at random or by score.
    """

    forget_ids: np.ndarray
    retain_ids: np.ndarray
    forget_class: int | None


def split(labels: ArrayLike, forget: str, *, num_classes: int, seed: int, scores: ArrayLike | None = None) -> Split:
    """Splits a training set into a non-empty forget set and a non-empty retain set.

    Args:
      labels: (N,) int class labels of the training set.
      forget: "class:3" for every example of class 3; "random:10%" for that percentage of all examples, drawn without
        replacement and rounded to a whole number; or "memorised:10%" for the percentage with the highest scores, ties
        going to the lower index. Percentages may be fractional, as in "random:2.5%".
      num_classes: number of classes.
      seed: chooses the random examples; not used for a class or for scores.
      scores: (N,) how strongly each example is memorised, higher for more (`metrics.memorisation_scores`); required
        for "memorised", and not used otherwise.

    Returns:
      The split, the same for the same arguments.

    Raises:
      ValueError: if the labels are not one-dimensional, `forget` is malformed, names a class outside
        [0, num_classes) or a percentage outside (0, 100), or selects no example or every example; if scores are needed
        and missing, of another shape than the labels, or not numbers.

    >>> split([0, 1, 1, 0], "memorised:50%", num_classes=2, seed=0, scores=[0.1, 0.7, 0.0, 0.2]).forget_ids.tolist()
    [1, 3]
    """
    labels = np.asarray(labels)
    if labels.ndim != 1:
        raise ValueError(f"labels: got shape {labels.shape}, expected (N,) class indices")
    forget_class = None
    if match := _CLASS.fullmatch(forget):
        forget_class = int(match[1])
        if not 0 <= forget_class < num_classes:
            raise ValueError(f"forget: got {forget!r}, expected a class from 0 to {num_classes - 1}")
        forgotten = labels == forget_class
    elif match := _SHARE.fullmatch(forget):
        percentage = float(match[2])
        if not 0 < percentage < 100:
            raise ValueError(f"forget: got {forget!r}, expected a percentage above 0 and below 100")
        forgotten = np.zeros(labels.size, bool)
        count = round(labels.size * percentage / 100)
        if match[1] == "random":
            forgotten[np.random.default_rng(seed).choice(labels.size, count, replace=False)] = True
        else:
            forgotten[_by_score(scores, labels.size, forget)[:count]] = True
    else:
        raise ValueError(
            f"forget: got {forget!r}, expected 'class:<index>', 'random:<number>%' or 'memorised:<number>%'"
        )
    if not forgotten.any():
        raise ValueError(
            f"forget: got {forget!r}, which selects none of the {labels.size} examples; expected at least one"
        )
    if forgotten.all():
        raise ValueError(
            f"forget: got {forget!r}, which selects all {labels.size} examples; expected at least one retained"
        )
    return Split(np.flatnonzero(forgotten), np.flatnonzero(~forgotten), forget_class)


def digest(split: Split) -> str:
    """Returns the SHA-256 of the split's indices in hex, the same on every platform.

    >>> digest(Split(np.array([1]), np.array([0, 2]), None))[:8]
    '5f3d3501'
    """
    ids = hashlib.sha256()
    for part in (split.forget_ids, split.retain_ids):
        # With the length, a shifted boundary between the two sets changes the digest.
        ids.update(len(part).to_bytes(8, "little"))
        ids.update(np.asarray(part, "<i8").tobytes())
    return ids.hexdigest()


def save_split(split: Split, path: str | os.PathLike[str], dataset: datasets.Dataset) -> None:
    """Writes a split as JSON, with its digest and that of its data set; the write is atomic.

    Args:
      split: a split with every training example of the data set on one side.
      path: file to write, in an existing folder; an existing file is replaced.
      dataset: the data set to which the indices refer.

    Raises:
      ValueError: if the split is not one of this data set's training examples, or names a class but forgets
        others.

    >>> dataset = datasets.load("digits", seed=0)
    >>> some = split(dataset.train_labels, "class:3", num_classes=dataset.num_classes, seed=0)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_split(some, f"{folder}/split.json", dataset)
    ...     digest(load_split(f"{folder}/split.json", dataset)) == digest(some)
    True
    """
    size = len(dataset.train_labels)
    if digest(_parts(split.forget_ids, size, None)) != digest(split):
        raise ValueError(
            f"split: got indices that are not 0 to {size - 1}, sorted, each on exactly one side; expected a split of "
            f"{dataset.name}"
        )
    if not _is_of_class(split, dataset):
        raise ValueError(
            f"split: got forget_class {split.forget_class} with other examples than those of that class; expected all "
            "of them and no others, or forget_class None"
        )
    record = {
        "data": dataset.name,
        "data_digest": datasets.digest(dataset),
        "split_digest": digest(split),
        "forget_class": split.forget_class,
        "forget_ids": split.forget_ids.tolist(),
    }
    path = Path(path)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        (Path(folder) / path.name).write_text(json.dumps(record) + "\n")
        os.replace(Path(folder) / path.name, path)


def load_split(path: str | os.PathLike[str], dataset: datasets.Dataset) -> Split:
    """Reads a split that `save_split` wrote, and checks that it belongs to exactly this data.

    Args:
      path: the file.
      dataset: the data set as it was when the split was saved, under any name.

    Returns:
      The split.

    Raises:
      ValueError: if the file is not a split, the data set's digest differs from the saved one, or the indices were
        changed.
      FileNotFoundError: if there is no such file.

    >>> dataset, other = datasets.load("digits", seed=0), datasets.load("digits", seed=1)
    >>> some = split(dataset.train_labels, "class:3", num_classes=dataset.num_classes, seed=0)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_split(some, f"{folder}/split.json", dataset)
    ...     load_split(f"{folder}/split.json", other)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: dataset: got digits with SHA-256 ..., expected digits with ..., for which ...split.json was saved
    """
    try:
        record = json.loads(Path(path).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: got {error}, expected a split as `save_split` writes it") from error
    wanted = {"data", "data_digest", "split_digest", "forget_class", "forget_ids"}
    if not isinstance(record, dict) or (missing := wanted - set(record)):
        lacking = f"an object without {', '.join(sorted(missing))}" if isinstance(record, dict) else repr(record)
        raise ValueError(f"{path}: got {lacking}, expected a split as `save_split` writes it")
    if (found := datasets.digest(dataset)) != record["data_digest"]:
        raise ValueError(
            f"dataset: got {dataset.name} with SHA-256 {found}, expected {record['data']} with "
            f"{record['data_digest']}, for which {path} was saved"
        )
    split = _parts(record["forget_ids"], len(dataset.train_labels), record["forget_class"])
    if (found := digest(split)) != record["split_digest"]:
        raise ValueError(
            f"{path}: got indices with SHA-256 {found}, expected {record['split_digest']}; the file was changed"
        )
    if not _is_of_class(split, dataset):
        raise ValueError(f"{path}: got examples other than those of class {split.forget_class}; the file was changed")
    return split


def _parts(forget_ids: ArrayLike, size: int, forget_class: int | None) -> Split:
    forgotten = np.isin(np.arange(size), forget_ids)
    return Split(np.flatnonzero(forgotten), np.flatnonzero(~forgotten), forget_class)


def _is_of_class(split: Split, dataset: datasets.Dataset) -> bool:
    """Whether a split that names a class forgets exactly the examples of it."""
    of_class = np.flatnonzero(np.asarray(dataset.train_labels) == split.forget_class)
    return split.forget_class is None or np.array_equal(split.forget_ids, of_class)


def _by_score(scores: ArrayLike | None, size: int, forget: str) -> np.ndarray:
    """Indices of all examples, highest score first."""
    if scores is None:
        raise ValueError(f"scores: got None, expected (N,) scores for {forget!r}, as from metrics.memorisation_scores")
    scores = np.asarray(scores, np.float64)
    if scores.shape != (size,):
        raise ValueError(f"scores: got shape {scores.shape}, expected one for each of the {size} labels")
    if np.isnan(scores).any():
        raise ValueError(
            f"scores: got {np.isnan(scores).sum()} that are not numbers, expected a number for every example"
        )
    return np.argsort(-scores, stable=True)
