"""Image sets of tensorflow-datasets, read into arrays on a machine without TensorFlow.

Prepared data is read without TensorFlow; only preparing it needs TensorFlow. `write` is shared by the data sets that
this package prepares itself.
"""

import contextlib
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]

# Images decoded at a time: a large set in its original sizes would not fit into memory next to the result.
_CHUNK = 1024


class StockSet(NamedTuple):
    """A data set of tensorflow-datasets.

    Attributes:
      builder: its name and configuration in tensorflow-datasets.
      test: the test split; the training split is "train".
      num_classes: number of classes.
      size: height and width of the images, after resizing if needed.
      otherwise: how to get it without TensorFlow.
    """

    builder: str
    test: str
    num_classes: int
    size: int
    otherwise: str = ""


SETS = {
    "fashion_mnist": StockSet("fashion_mnist", "test", 10, 28),
    "cifar10": StockSet("cifar10", "test", 10, 32, "set EUPMU_CIFAR to a folder with cifar-10-python.tar.gz"),
    "cifar100": StockSet("cifar100", "test", 100, 32, "set EUPMU_CIFAR to a folder with cifar-100-python.tar.gz"),
    "svhn_cropped": StockSet("svhn_cropped", "test", 10, 32),
    "imagenette": StockSet("imagenette/160px-v2", "validation", 10, 64),
}


def read(name: str, data_dir: str | os.PathLike[str] | None) -> Arrays:
    """Reads a prepared data set.

    An image of another size is cropped to its central square and resized, bilinear with antialiasing; only "imagenette"
    has such images.

    Args:
      name: a key of `SETS`.
      data_dir: folder of the prepared data; None means the default of tensorflow-datasets.

    Returns:
      train_images (N, S, S, C) float32 in [0, 1], train_labels (N,) int32, test_images (M, S, S, C) float32,
      test_labels (M,) int32, in the order of tensorflow-datasets.

    Raises:
      FileNotFoundError: if the data is not prepared in `data_dir`, or in a format that only TensorFlow reads.
    """
    import tensorflow_datasets as tfds

    stock = SETS[name]
    with quiet_log():
        try:
            sources = tfds.data_source(stock.builder, split=["train", stock.test], data_dir=data_dir, download=False)
        except Exception as error:
            # tensorflow-datasets has no exception of its own for absent data; what it raises depends on the code path.
            builder = tfds.builder(stock.builder, data_dir=data_dir)
            if not builder.is_prepared():
                found = f"not prepared in {builder.data_dir}"
            elif "array_record" not in {found.value for found in builder.info.available_file_formats()}:
                found = f"{builder.data_dir} holds it in a format that only TensorFlow reads"
            else:
                raise
            raise FileNotFoundError(f"{name}: {found}; {_how_to_prepare(stock, data_dir)}") from error
        return arrays(sources, stock.size)


def is_prepared(name: str, data_dir: str | os.PathLike[str] | None) -> bool:
    """Whether `read` would find the data; arguments as in `read`."""
    import tensorflow_datasets as tfds

    with quiet_log():
        return tfds.builder(SETS[name].builder, data_dir=data_dir).is_prepared()


def arrays(sources: Sequence[Any], size: int) -> Arrays:
    """Decodes the training and the test source into arrays, with the result of `read`."""
    (train_images, train_labels), (test_images, test_labels) = (_decode(source, size) for source in sources)
    return train_images, train_labels, test_images, test_labels


def write(builder: Any, folder: Path) -> None:
    """Prepares a data set silently and atomically.

    Args:
      builder: a tensorflow-datasets builder without the steps that need TensorFlow.
      folder: holds the files the builder would download, if any; others are written to it.

    Raises:
      OSError: if the data cannot be written; not if another process wrote it first.
    """
    import tensorflow_datasets as tfds

    with quiet_log(), _no_output():
        try:
            builder.download_and_prepare(
                download_dir=folder,
                download_config=tfds.download.DownloadConfig(
                    manual_dir=folder, try_download_gcs=False, force_checksums_validation=True
                ),
                file_format="array_record",
            )
        except OSError:
            # The last step renames a folder, which fails if another process was first; its data is equally good.
            if not builder.is_prepared():
                raise


@contextlib.contextmanager
def quiet_log() -> Iterator[None]:
    """Keeps tensorflow-datasets from warning about missing data and missing OpenCV, neither of which is an error."""
    from absl import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _how_to_prepare(stock: StockSet, data_dir: str | os.PathLike[str] | None) -> str:
    where = "" if data_dir is None else f" --data_dir={os.fspath(data_dir)}"
    ways = [
        f"with a network and TensorFlow run `tfds build {stock.builder} --file_format=array_record --overwrite{where}`",
        "copy that folder from a machine that has it",
        *filter(None, [stock.otherwise]),
    ]
    return ", or ".join(ways)


def _decode(source: Any, size: int) -> tuple[np.ndarray, np.ndarray]:
    images: list[np.ndarray] = []
    labels: list[int] = []
    for start in range(0, len(source), _CHUNK):
        # Reading record by record takes twice as long. Threads do not help, as the decoder holds the GIL.
        examples = source.__getitems__(range(start, min(start + _CHUNK, len(source))))
        images.append(np.stack([_fit(example["image"], size) for example in examples]))
        labels.extend(example["label"] for example in examples)
    return np.concatenate(images) / np.float32(255), np.array(labels, np.int32)


def _fit(image: np.ndarray, size: int) -> np.ndarray:
    if image.shape[:2] == (size, size):
        return image
    from PIL import Image, ImageOps

    return np.asarray(ImageOps.fit(Image.fromarray(image), (size, size), Image.Resampling.BILINEAR))


@contextlib.contextmanager
def _no_output() -> Iterator[None]:
    """Suppresses messages and progress bars; the switch of tensorflow-datasets for them cannot be undone."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
