"""An image classification data set in memory, loaded by name."""

import hashlib
import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from eupmu_jax.data import cifar, digits, emoji, fashion_mnist, stock

# (seed, data_dir) -> images and labels.
_Read = Callable[[int, str | os.PathLike[str] | None], stock.Arrays]


class Dataset(NamedTuple):
    """A labelled image data set, held in memory.

    Attributes:
      name: the name under which it was loaded.
      train_images: (N, H, W, C) float32 in [0, 1].
      train_labels: (N,) int32 in [0, num_classes).
      test_images: (M, H, W, C) float32 in [0, 1].
      test_labels: (M,) int32 in [0, num_classes).
      num_classes: number of classes.
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    num_classes: int


def load(name: str, *, seed: int = 0, data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """Loads a data set by name and decodes it into memory. Nothing is downloaded.

    | name | images | classes | train, test | from |
    |---|---|---|---|---|
    | digits | 8x8 | 10 | 1,437, 360 | scikit-learn |
    | fashion_mnist | 28x28 | 10 | 60,000, 10,000 | `fashion_mnist` |
    | cifar10, cifar100 | 32x32 colour | 10, 100 | 50,000, 10,000 | `cifar` |
    | svhn_cropped | 32x32 colour | 10 | 73,257, 26,032 | prepared by tensorflow-datasets |
    | imagenette | 64x64 colour, central square | 10 | 9,469, 3,925 | prepared by tensorflow-datasets |
    | emoji, emoji_32 | 64x64, or 32x32, colour | 9 | 3,082, 699 | `emoji` |

    Args:
      name: a name from the table.
      seed: chooses the train/test split of "digits"; all others come with a fixed split.
      data_dir: folder where tensorflow-datasets keeps prepared data; None means its own default. Not used for "digits".

    Returns:
      The data set, as NumPy arrays.

    Raises:
      ValueError: if the name is unknown, or the source of the data is not the expected one.
      FileNotFoundError: if the data is not in `data_dir` and this machine has nothing to prepare it from; the message
        says how to get it.

    >>> load("digits").train_images.shape
    (1437, 8, 8, 1)
    """
    if name not in _LOADERS:
        raise ValueError(f"name: got {name!r}, expected one of {', '.join(_LOADERS)}")
    read, classes = _LOADERS[name]
    return Dataset(name, *read(seed, data_dir), num_classes=classes)


def num_classes(name: str) -> int:
    """The number of classes of a data set, as in the table of `load`; nothing is loaded.

    >>> num_classes("emoji")
    9
    """
    return _LOADERS[name][1]


def digest(dataset: Dataset) -> str:
    """Returns the SHA-256 in hex of images and labels of both sets, the same on every platform.

    The name is not included. Cost: one pass over all bytes.

    >>> digits = load("digits")
    >>> digest(digits) == digest(digits._replace(name="other"))
    True
    >>> digest(digits) == digest(load("digits", seed=1))
    False
    """
    found = hashlib.sha256(str(dataset.num_classes).encode())
    for array in (dataset.train_images, dataset.train_labels, dataset.test_images, dataset.test_labels):
        array = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        # With type and shape, a shifted boundary between two arrays changes the digest.
        found.update(f"{array.dtype.str}{array.shape}".encode())
        found.update(array.data)
    return found.hexdigest()


def _stock(name: str, read: _Read | None = None) -> tuple[_Read, int]:
    return read or (lambda seed, data_dir: stock.read(name, data_dir)), stock.SETS[name].num_classes


_LOADERS: dict[str, tuple[_Read, int]] = {
    "digits": (lambda seed, data_dir: digits.load(seed), 10),
    "fashion_mnist": _stock("fashion_mnist", lambda seed, data_dir: fashion_mnist.load(data_dir)),
    "cifar10": _stock("cifar10", lambda seed, data_dir: cifar.load("cifar10", data_dir)),
    "cifar100": _stock("cifar100", lambda seed, data_dir: cifar.load("cifar100", data_dir)),
    "svhn_cropped": _stock("svhn_cropped"),
    "imagenette": _stock("imagenette"),
    "emoji": (lambda seed, data_dir: emoji.load(data_dir), len(emoji.CATEGORIES)),
    "emoji_32": (lambda seed, data_dir: emoji.halved(*emoji.load(data_dir)), len(emoji.CATEGORIES)),
}
