"""An image classification data set in memory, loaded by name."""

import os
from typing import NamedTuple

import numpy as np

from eupmu_jax.data import digits, fashion_mnist


class Dataset(NamedTuple):
    """A labelled image data set, held in memory.

    Attributes:
      name: the name it was loaded by.
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
    """Loads a data set by name.

    Args:
      name: "digits" (scikit-learn, 8x8) or "fashion_mnist" (tensorflow-datasets, 28x28).
      seed: chooses the train/test split of "digits"; "fashion_mnist" comes with its own, which no seed changes.
      data_dir: folder where tensorflow-datasets keeps prepared data; None means its own default. "digits" has no use
        for it.

    Returns:
      The data set, as numpy arrays.

    Raises:
      ValueError: if the name is unknown.
      FileNotFoundError: if Fashion-MNIST is neither prepared in `data_dir` nor on this machine.
    """
    if name == "digits":
        return Dataset(name, *digits.load(seed), num_classes=10)
    if name == "fashion_mnist":
        return Dataset(name, *fashion_mnist.load(data_dir), num_classes=10)
    raise ValueError(f"name: got {name!r}, want 'digits' or 'fashion_mnist'")
