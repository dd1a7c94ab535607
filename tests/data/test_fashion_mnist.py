import gzip
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError
from tensorflow_datasets.image_classification.mnist import FashionMNIST

from eupmu_jax.data import fashion_mnist, load

# Run in one worker, so that the data is prepared only once.
pytestmark = pytest.mark.xdist_group("fashion_mnist")

PREFIXES = {"train": "train", "test": "t10k"}
SIZES = {"train": 60_000, "test": 10_000}


@pytest.fixture(scope="module")
def files() -> Path:
    folder = Path(os.environ.get(fashion_mnist.SOURCE_VARIABLE) or fashion_mnist.DEBIAN_FOLDER)
    if not folder.is_dir():
        pytest.skip(f"Debian's dataset-fashion-mnist is not installed and {fashion_mnist.SOURCE_VARIABLE} is not set")
    return folder


@pytest.fixture(scope="module")
def prepared(files, tmp_path_factory) -> Path:
    data_dir = tmp_path_factory.mktemp("prepared")
    fashion_mnist.prepare(data_dir)
    return data_dir


@pytest.fixture(scope="module")
def data(prepared):
    return load("fashion_mnist", data_dir=prepared)


def upstream(files: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    def read(kind: str, offset: int) -> np.ndarray:
        content = gzip.decompress((files / f"{PREFIXES[split]}-{kind}-ubyte.gz").read_bytes())
        return np.frombuffer(content, np.uint8, offset=offset)

    return read("images-idx3", 16).reshape(-1, 28, 28, 1), read("labels-idx1", 8)


def pairs(images: np.ndarray, labels: np.ndarray) -> list[tuple[bytes, int]]:
    return sorted((image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("split", SIZES)
def test_images_have_the_documented_shapes_range_and_class_counts(data, split):
    images, labels = getattr(data, f"{split}_images"), getattr(data, f"{split}_labels")
    assert data.name == "fashion_mnist"
    assert data.num_classes == 10
    assert images.shape == (SIZES[split], 28, 28, 1)
    assert images.dtype == np.float32
    assert labels.dtype == np.int32
    assert images.min() == 0
    assert images.max() == 1
    np.testing.assert_array_equal(np.bincount(labels), np.full(10, SIZES[split] // 10))


@pytest.mark.slow
def test_images_and_labels_match_the_files(data, files):
    images = np.rint(data.train_images * 255).astype(np.uint8)
    assert pairs(images, data.train_labels) == pairs(*upstream(files, "train"))


@pytest.mark.slow
@pytest.mark.parametrize("split", SIZES)
def test_the_stock_reader_gives_the_same_first_image(data, prepared, split):
    source = tfds.data_source("fashion_mnist", split=split, data_dir=prepared, download=False)
    assert len(source) == SIZES[split]
    np.testing.assert_array_equal(
        source[0]["image"] / np.float32(255), getattr(data, f"{split}_images")[0], strict=True
    )
    assert source[0]["label"] == getattr(data, f"{split}_labels")[0]


@pytest.mark.slow
def test_preparing_leaves_no_other_files_behind(prepared):
    assert [path.name for path in prepared.iterdir()] == ["fashion_mnist"]
    assert [path.name for path in (prepared / "fashion_mnist").iterdir()] == ["3.0.1"]


@pytest.mark.slow
def test_the_subclass_is_not_registered(prepared):
    assert tfds.builder_cls("fashion_mnist") is FashionMNIST


@pytest.mark.slow
def test_prepared_data_do_not_need_the_files(prepared, tmp_path, monkeypatch):
    monkeypatch.setenv(fashion_mnist.SOURCE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(fashion_mnist, "read", lambda data_dir: (data_dir,) * 4)
    assert load("fashion_mnist", data_dir=prepared).train_images == prepared


@pytest.mark.slow
def test_the_default_folder_is_used_without_warnings(prepared):
    # Use a new process, since the default is read on import and each warning is given only once.
    script = "from eupmu_jax.data import load; print(load('fashion_mnist').test_images.shape)"
    environment = {**os.environ, "TFDS_DATA_DIR": str(prepared)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("(10000, 28, 28, 1)\n", "")


def test_files_with_either_header_are_accepted(files, tmp_path, monkeypatch):
    # Staging an already staged folder must not change it.
    for source, name in ((files, "once"), (tmp_path / "once", "twice")):
        monkeypatch.setenv(fashion_mnist.SOURCE_VARIABLE, str(source))
        (tmp_path / name).mkdir()
        fashion_mnist._stage_files(tmp_path / name)
    for path in (tmp_path / "once").iterdir():
        assert path.read_bytes() == (tmp_path / "twice" / path.name).read_bytes()


def test_a_damaged_file_is_refused_without_other_output(files, tmp_path, monkeypatch, capfd):
    folder = shutil.copytree(files, tmp_path / "files")
    damaged = folder / "t10k-labels-idx1-ubyte.gz"
    content = bytearray(damaged.read_bytes())
    content[1000] ^= 1
    damaged.write_bytes(content)
    monkeypatch.setenv(fashion_mnist.SOURCE_VARIABLE, str(folder))
    with pytest.raises(NonMatchingChecksumError, match="t10k-labels-idx1-ubyte"):
        load("fashion_mnist", data_dir=tmp_path / "data")
    assert not tfds.builder("fashion_mnist", data_dir=tmp_path / "data").is_prepared()
    assert list((tmp_path / "data").rglob("*.array_record*")) == []
    assert capfd.readouterr() == ("", "")


def test_a_missing_file_is_reported(tmp_path, monkeypatch):
    monkeypatch.setenv(fashion_mnist.SOURCE_VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError) as caught:
        load("fashion_mnist", data_dir=tmp_path / "data")
    assert str(caught.value) == (
        f"Fashion-MNIST: no train-images-idx3-ubyte.gz in {tmp_path / 'nowhere'}; "
        "install Debian's `dataset-fashion-mnist`, or set EUPMU_FASHION_MNIST to a folder with the four files"
    )
    assert not (tmp_path / "data").exists()


@pytest.mark.slow
def test_it_does_not_matter_if_another_process_prepares_the_data_first(files, prepared, tmp_path, monkeypatch):
    stage = fashion_mnist._stage_files

    def stage_and_lose_the_race(target: Path) -> None:
        stage(target)
        monkeypatch.setattr(FashionMNIST, "_split_generators", lose)

    def lose(builder, dl_manager):
        shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
        raise OSError("Directory not empty")

    monkeypatch.setattr(fashion_mnist, "_stage_files", stage_and_lose_the_race)
    fashion_mnist.prepare(tmp_path)
    assert tfds.builder("fashion_mnist", data_dir=tmp_path).is_prepared()


def test_a_failure_to_write_is_not_hidden(files, tmp_path, monkeypatch):
    def fail(builder, dl_manager):
        raise OSError("No space left on device")

    monkeypatch.setattr(FashionMNIST, "_split_generators", fail)
    with pytest.raises(OSError, match="No space left"):
        fashion_mnist.prepare(tmp_path)


def test_mocked_data_can_be_read():
    class Source(list):
        # TFDS's own mock source cannot be read in batches.
        def __getitems__(self, keys):
            return [self[key] for key in keys]

    def as_data_source(builder, split, **kwargs):
        sizes = {"train": 5, "test": 3}
        rng = np.random.default_rng(0)
        return [
            Source({"image": rng.integers(0, 256, (28, 28, 1), np.uint8), "label": i} for i in range(sizes[name]))
            for name in split
        ]

    with tfds.testing.mock_data(as_data_source_fn=as_data_source):
        train_images, train_labels, test_images, test_labels = fashion_mnist.read(None)
    assert train_images.shape == (5, 28, 28, 1)
    assert test_images.shape == (3, 28, 28, 1)
    assert train_images.dtype == np.float32
    assert train_labels.tolist() == [0, 1, 2, 3, 4]
    assert test_labels.tolist() == [0, 1, 2]
