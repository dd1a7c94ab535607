"""Fashion-MNIST through tensorflow-datasets, on a machine without TensorFlow.

tensorflow-datasets reads prepared data without TensorFlow, but cannot prepare any. `prepare` does so from the four
gzip files that upstream publishes. It writes the same files as the stock builder, so any other program can read them.
"""

import gzip
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from eupmu_jax.data import stock

SOURCE_VARIABLE = "EUPMU_FASHION_MNIST"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")

# File name -> modification time in upstream's gzip header.
_FILES = {
    "train-images-idx3-ubyte.gz": 1504176606,
    "train-labels-idx1-ubyte.gz": 1504176606,
    "t10k-images-idx3-ubyte.gz": 1504176627,
    "t10k-labels-idx1-ubyte.gz": 1504176627,
}


def load(data_dir: str | os.PathLike[str] | None) -> stock.Arrays:
    """Loads Fashion-MNIST, preparing it first if necessary.

    Args:
      data_dir: folder of the prepared data; None means the default of tensorflow-datasets.

    Returns:
      train_images (60000, 28, 28, 1) float32 in [0, 1], train_labels (60000,) int32, test_images (10000, 28, 28, 1)
      float32, test_labels (10000,) int32, in the order of tensorflow-datasets, which is not that of upstream's files.

    Raises:
      FileNotFoundError: if the data is not prepared and upstream's files are not on this machine.
      tensorflow_datasets.core.download.download_manager.NonMatchingChecksumError: if one of the files is damaged.
    """
    if not stock.is_prepared("fashion_mnist", data_dir):
        prepare(data_dir)
    return read(data_dir)


def prepare(data_dir: str | os.PathLike[str] | None) -> None:
    """Writes Fashion-MNIST to `data_dir` atomically, from upstream's files.

    The files come from the folder named by the environment variable EUPMU_FASHION_MNIST, or else from Debian's package
    `dataset-fashion-mnist`. They are not downloaded: without a network tensorflow-datasets retries for minutes.

    Args:
      data_dir: folder to write to; None means the default of tensorflow-datasets.

    Raises:
      FileNotFoundError: if one of the four files is missing.
      tensorflow_datasets.core.download.download_manager.NonMatchingChecksumError: if one of the files is damaged.
    """
    from PIL import Image
    from tensorflow_datasets.image_classification.mnist import FashionMNIST

    class Builder(FashionMNIST, skip_registration=True):  # type: ignore[call-arg]
        """The stock builder, without the three steps that need TensorFlow."""

        name = "fashion_mnist"

        def _split_generators(self, dl_manager: Any) -> Any:
            return super()._split_generators(SimpleNamespace(download_and_extract=dl_manager.download))

        def _generate_examples(self, num_examples: int, data_path: Any, label_path: Any) -> Iterator[tuple[int, dict]]:
            pixels = np.frombuffer(gzip.decompress(data_path.read_bytes()), np.uint8, offset=16)
            labels = np.frombuffer(gzip.decompress(label_path.read_bytes()), np.uint8, offset=8)
            for index, image in enumerate(pixels.reshape(num_examples, 28, 28)):
                # A PIL image encodes itself; an array would be encoded with TensorFlow.
                yield index, {"image": Image.fromarray(image), "label": int(labels[index])}

    with tempfile.TemporaryDirectory() as folder:
        _stage_files(Path(folder))
        with stock.quiet_log():
            builder = Builder(data_dir=data_dir)
        stock.write(builder, Path(folder))


def read(data_dir: str | os.PathLike[str] | None) -> stock.Arrays:
    """Reads prepared Fashion-MNIST, with the arguments and result of `load`."""
    return stock.read("fashion_mnist", data_dir)


def _stage_files(target: Path) -> None:
    """Copies upstream's four files to `target`, byte for byte as upstream publishes them."""
    source = Path(os.environ.get(SOURCE_VARIABLE) or DEBIAN_FOLDER)
    for name, mtime in _FILES.items():
        try:
            content = (source / name).read_bytes()
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"Fashion-MNIST: no {name} in {source}; install Debian's `dataset-fashion-mnist`, "
                f"or set {SOURCE_VARIABLE} to a folder with the four files"
            ) from error
        # Debian strips name and time from the gzip header (RFC 1952); upstream's checksum includes them.
        if content[:4] == b"\x1f\x8b\x08\x00":
            header = content[:3] + b"\x08" + mtime.to_bytes(4, "little") + content[8:10]
            content = header + name.removesuffix(".gz").encode() + b"\x00" + content[10:]
        (target / name).write_bytes(content)
