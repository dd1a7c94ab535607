"""CIFAR-10 and CIFAR-100 through tensorflow-datasets, prepared without TensorFlow from upstream's "python version".

The files are the same as those of the stock builders, so any other program can read them. The archive is unpickled only
after its SHA-256 has been checked against upstream's.

Source: Krizhevsky, "Learning multiple layers of features from tiny images", 2009.
"""

import hashlib
import os
import pickle
import tarfile
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from eupmu_jax.data import stock

SOURCE_VARIABLE = "EUPMU_CIFAR"


class Archive(NamedTuple):
    """An archive from upstream.

    Attributes:
      file, sha256: its name and SHA-256.
      train, test, meta: the pickles in it.
      labels: label in tensorflow-datasets -> its key in the batches, and the key of its names in `meta`.
    """

    file: str
    sha256: str
    train: tuple[str, ...]
    test: str
    meta: str
    labels: dict[str, tuple[bytes, bytes]]


ARCHIVES = {
    "cifar10": Archive(
        "cifar-10-python.tar.gz",
        "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
        tuple(f"cifar-10-batches-py/data_batch_{number}" for number in range(1, 6)),
        "cifar-10-batches-py/test_batch",
        "cifar-10-batches-py/batches.meta",
        {"label": (b"labels", b"label_names")},
    ),
    "cifar100": Archive(
        "cifar-100-python.tar.gz",
        "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
        ("cifar-100-python/train",),
        "cifar-100-python/test",
        "cifar-100-python/meta",
        {
            "label": (b"fine_labels", b"fine_label_names"),
            "coarse_label": (b"coarse_labels", b"coarse_label_names"),
        },
    ),
}


def load(name: str, data_dir: str | os.PathLike[str] | None) -> stock.Arrays:
    """Loads "cifar10" or "cifar100", preparing it first if necessary.

    Args:
      name: a key of `ARCHIVES`.
      data_dir: folder of the prepared data; None means the default of tensorflow-datasets.

    Returns:
      train_images (50000, 32, 32, 3) float32 in [0, 1], train_labels (50000,) int32, test_images (10000, 32, 32, 3)
      float32, test_labels (10000,) int32, in the order of tensorflow-datasets.

    Raises:
      FileNotFoundError: if the data is not prepared and upstream's archive is not on this machine.
      ValueError: if the archive is not upstream's.
    """
    if os.environ.get(SOURCE_VARIABLE) and not stock.is_prepared(name, data_dir):
        prepare(name, data_dir)
    return stock.read(name, data_dir)


def prepare(name: str, data_dir: str | os.PathLike[str] | None) -> None:
    """Writes the data set to `data_dir` atomically, from the archive in the folder that EUPMU_CIFAR names.

    Args:
      name: a key of `ARCHIVES`.
      data_dir: folder to write to; None means the default of tensorflow-datasets.

    Raises:
      FileNotFoundError: if the archive is missing.
      ValueError: if the archive is not upstream's.
    """
    import tensorflow_datasets as tfds
    from PIL import Image

    archive = ARCHIVES[name]
    pickles = _unpickle(archive)

    class Builder(tfds.builder_cls(name), skip_registration=True):  # type: ignore[call-arg, misc]
        """The stock builder, without the steps that need TensorFlow."""

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            for label, (_, names) in archive.labels.items():
                self.info.features[label].names = [text.decode() for text in pickles[archive.meta][names]]
            return {
                "train": self._generate_examples("train_", [pickles[member] for member in archive.train]),
                "test": self._generate_examples("test_", [pickles[archive.test]]),
            }

        def _generate_examples(self, prefix: str, batches: Iterable[dict]) -> Iterator[tuple[int, dict]]:
            rows = ((batch, row) for batch in batches for row in range(len(batch[b"data"])))
            for index, (batch, row) in enumerate(rows):
                pixels = batch[b"data"][row].reshape(3, 32, 32).transpose(1, 2, 0)
                labels = {label: int(batch[key][row]) for label, (key, _) in archive.labels.items()}
                # A PIL image encodes itself; an array would be encoded with TensorFlow.
                image = Image.fromarray(np.ascontiguousarray(pixels))
                yield index, {"id": f"{prefix}{index:05d}", "image": image, **labels}

    Builder.name = name
    with tempfile.TemporaryDirectory() as folder:
        with stock.quiet_log():
            builder = Builder(data_dir=data_dir)
        stock.write(builder, Path(folder))


def _unpickle(archive: Archive) -> dict[str, dict]:
    """The pickles of the archive by member name."""
    path = Path(os.environ.get(SOURCE_VARIABLE, "")) / archive.file
    if not path.is_file():
        raise FileNotFoundError(
            f"{archive.file}: not found in {path.parent}; set {SOURCE_VARIABLE} to the folder that holds it"
        )
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != archive.sha256:
        raise ValueError(f"{path}: got SHA-256 {found}, expected upstream's {archive.sha256}; the file is damaged")
    pickles = {}
    # NumPy 2.4.0 to 2.4.4 warn about the form in which NumPy wrote dtypes in 2009.
    with tarfile.open(path) as tar, warnings.catch_warnings():
        warnings.simplefilter("ignore", np.exceptions.VisibleDeprecationWarning)
        for member in (*archive.train, archive.test, archive.meta):
            pickles[member] = pickle.load(tar.extractfile(member), encoding="bytes")  # type: ignore[arg-type]
    return pickles
