import io
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from eupmu_jax.data import load, stock

# "fashion_mnist" has its own tests.
NAMES = ("cifar10", "cifar100", "svhn_cropped", "imagenette")


class Source(list):
    # TFDS's own mock source cannot be read in batches.
    def __getitems__(self, keys):
        return [self[key] for key in keys]


def mocked_source(builder, split, **kwargs):
    """Examples of the shape that the stock builder declares; images of unspecified size are 80x120."""
    rng = np.random.default_rng(0)
    height, width, channels = (
        axis or side for axis, side in zip(builder.info.features["image"].shape, (80, 120, 3), strict=True)
    )
    classes = builder.info.features["label"].num_classes

    def source(count):
        image = lambda: rng.integers(0, 256, (height, width, channels), np.uint8)
        return Source({"image": image(), "label": i % classes} for i in range(count))

    return [source({"train": 7, "test": 3, "validation": 3}[name]) for name in split]


def write_prepared(name, data_dir, images, file_format="array_record"):
    """Prepares a few images with the features, version and file names of the stock builder."""
    known = stock.SETS[name]
    parent = tfds.builder_cls(name)

    class Builder(parent, skip_registration=True):
        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in ("train", known.test)}

        def _generate_examples(self, split):
            for index, image in enumerate(images):
                labels = {key: index % 10 for key in self.info.features if key.endswith("label")}
                texts = {"id": f"{split}{index}"} if "id" in self.info.features else {}
                yield index, {"image": image, **labels, **texts}

    Builder.name = parent.name
    config = known.builder.partition("/")[2]
    builder = Builder(data_dir=data_dir, **({"config": config} if config else {}))
    builder.download_and_prepare(
        file_format=file_format, download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )
    return builder


@pytest.mark.parametrize("name", NAMES)
def test_mocked_data_have_the_shapes_dtypes_and_classes_of_the_table(name, monkeypatch):
    monkeypatch.delenv("EUPMU_CIFAR", raising=False)
    with tfds.testing.mock_data(as_data_source_fn=mocked_source):
        data = load(name)
        features = tfds.builder(stock.SETS[name].builder).info.features
    side = stock.SETS[name].size
    assert data.name == name
    assert data.num_classes == features["label"].num_classes
    assert data.train_images.shape == (7, side, side, 3)
    assert data.test_images.shape == (3, side, side, 3)
    assert data.train_images.dtype == data.test_images.dtype == np.float32
    assert data.train_labels.dtype == data.test_labels.dtype == np.int32
    assert data.train_labels.tolist() == list(range(7))
    assert 0 <= data.train_images.min() < data.train_images.max() <= 1


@pytest.mark.parametrize("name", NAMES[:3])
def test_images_of_the_right_size_are_unchanged_bit_for_bit(name, tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (5, 32, 32, 3), np.uint8)
    write_prepared(name, tmp_path, [Image.fromarray(image) for image in pixels])
    data = load(name, data_dir=tmp_path)
    order = np.argsort(data.train_labels)
    np.testing.assert_array_equal(np.rint(data.train_images[order] * 255), pixels)
    assert len(data.test_labels) == 5


def test_images_of_other_sizes_are_cropped_to_the_central_square_and_scaled(tmp_path):
    # The images are wide, tall, smaller than the result, and grey; the central square is red and the rest blue.
    def image(width, height):
        whole, square = Image.new("RGB", (width, height), "blue"), min(width, height)
        whole.paste(
            "red", ((width - square) // 2, (height - square) // 2, (width + square) // 2, (height + square) // 2)
        )
        return whole

    images = [image(224, 160), image(160, 400), image(40, 30)]
    files = [io.BytesIO() for _ in range(4)]
    for shown, file in zip([*images, Image.new("L", (160, 160), 77)], files, strict=True):
        shown.save(file, "jpeg", quality=95, subsampling=0)
    write_prepared("imagenette", tmp_path, [file.getvalue() for file in files])
    data = load("imagenette", data_dir=tmp_path)
    assert data.train_images.shape == (4, 64, 64, 3)
    inner = data.train_images[np.argsort(data.train_labels)][:, 2:-2, 2:-2]
    np.testing.assert_allclose(inner[:3], np.broadcast_to([1, 0, 0], inner[:3].shape), atol=0.03)
    np.testing.assert_allclose(inner[3], 77 / 255, atol=0.01)


def test_more_images_than_one_chunk_can_be_decoded(monkeypatch):
    monkeypatch.setattr(stock, "_CHUNK", 3)
    with tfds.testing.mock_data(as_data_source_fn=mocked_source):
        chunks = stock.read("cifar10", None)
    monkeypatch.undo()
    with tfds.testing.mock_data(as_data_source_fn=mocked_source):
        for found, expected in zip(chunks, stock.read("cifar10", None), strict=True):
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", NAMES)
def test_for_missing_data_one_line_says_how_to_get_them(name, tmp_path, monkeypatch, capfd):
    monkeypatch.delenv("EUPMU_CIFAR", raising=False)
    with pytest.raises(FileNotFoundError) as caught:
        load(name, data_dir=tmp_path / "data")
    message = str(caught.value)
    assert message.startswith(f"{name}: not prepared in {tmp_path / 'data'}")
    command = f"tfds build {stock.SETS[name].builder} --file_format=array_record --overwrite --data_dir={tmp_path}/data"
    assert f"`{command}`" in message
    assert "\n" not in message
    assert ("EUPMU_CIFAR" in message) == name.startswith("cifar")
    assert not (tmp_path / "data").exists()
    assert capfd.readouterr() == ("", "")


def test_the_default_folder_is_named(tmp_path):
    # Use a new process, since the default is read on import.
    script = "from eupmu_jax.data import load; load('svhn_cropped')"
    failed = subprocess.run(
        [sys.executable, "-c", script], env={"TFDS_DATA_DIR": str(tmp_path), "PATH": "", "HOME": str(tmp_path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    last = failed.stderr.splitlines()[-1]
    assert last.startswith(f"FileNotFoundError: svhn_cropped: not prepared in {tmp_path}/svhn_cropped")
    assert "--data_dir" not in last


def test_data_that_only_tensorflow_can_read_are_reported_as_such(tmp_path):
    builder = write_prepared("cifar10", tmp_path, [Image.new("RGB", (32, 32))])
    info = builder.data_path / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(
        FileNotFoundError, match=r"^cifar10: .*3\.0\.2 holds it in a format that only TensorFlow reads; "
    ):
        stock.read("cifar10", tmp_path)


def test_a_fault_in_prepared_data_is_not_reported_as_missing_data(tmp_path, monkeypatch):
    write_prepared("cifar10", tmp_path, [Image.new("RGB", (32, 32))])
    monkeypatch.setitem(stock.SETS, "cifar10", stock.SETS["cifar10"]._replace(test="nowhere"))
    with pytest.raises(ValueError, match="Unknown split"):
        stock.read("cifar10", tmp_path)
