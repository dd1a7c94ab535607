import hashlib
import io
import pickle
import struct
import tarfile

import numpy as np
import pytest
import tensorflow_datasets as tfds

from eupmu_jax.data import cifar, load

ROWS = 4


class _Python2Pickler(pickle._Pickler):
    """Pickles like Python 2 with NumPy 1: text as bytes, arrays from the old module, dtype flags as 0 and 1."""

    def _text(self, text):
        text = text.encode() if isinstance(text, str) else text
        self.write(pickle.BINSTRING + struct.pack("<i", len(text)) + text)

    def _type(self, dtype):
        self.write(b"cnumpy\ndtype\n")
        self.save((dtype.str[1:], 0, 1))
        self.write(pickle.REDUCE)
        self.save((3, "|", None, None, None, -1, -1, 0))
        self.write(pickle.BUILD)

    def _array(self, array):
        self.write(b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n")
        self.save((0,))
        self.save("b")
        self.write(pickle.TUPLE + pickle.REDUCE)
        self.save((1, array.shape, array.dtype, False, array.tobytes()))
        self.write(pickle.BUILD)

    dispatch = pickle._Pickler.dispatch | {
        str: _text,
        bytes: _text,
        type(np.dtype("u1")): _type,
        np.ndarray: _array,
    }


def dumps(tree) -> bytes:
    file = io.BytesIO()
    _Python2Pickler(file, protocol=2).dump(tree)
    return file.getvalue()


def batch(name, seed):
    rng = np.random.default_rng(seed)
    tree = {
        "batch_label": f"batch {seed}",
        "data": rng.integers(0, 256, (ROWS, 3072), np.uint8),
        "filenames": ["x.png"],
    }
    if name == "cifar10":
        return tree | {"labels": rng.integers(0, 10, ROWS).tolist()}
    return tree | {
        "fine_labels": rng.integers(0, 100, ROWS).tolist(),
        "coarse_labels": rng.integers(0, 20, ROWS).tolist(),
    }


def meta(name):
    words = lambda kind, count: [f"{kind}{k}" for k in range(count)]
    if name == "cifar10":
        return {"label_names": words("class", 10), "num_vis": 3072, "num_cases_per_batch": ROWS}
    return {"fine_label_names": words("class", 100), "coarse_label_names": words("group", 20)}


@pytest.fixture(params=["cifar10", "cifar100"])
def upstream(request, tmp_path, monkeypatch):
    """(name, training batches, test batch) of a small archive in upstream's format, named by the variable."""
    name = request.param
    archive = cifar.ARCHIVES[name]
    batches = [batch(name, seed) for seed in range(len(archive.train) + 1)]
    members = dict(zip((*archive.train, archive.test, archive.meta), (*batches, meta(name)), strict=True))
    folder = tmp_path / "files"
    folder.mkdir()
    with tarfile.open(folder / archive.file, "w:gz") as tar:
        for member, tree in members.items():
            content = dumps(tree)
            header = tarfile.TarInfo(member)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    sha256 = hashlib.sha256((folder / archive.file).read_bytes()).hexdigest()
    monkeypatch.setitem(cifar.ARCHIVES, name, archive._replace(sha256=sha256))
    monkeypatch.setenv(cifar.SOURCE_VARIABLE, str(folder))
    return name, batches[:-1], batches[-1]


def rows(batches, key):
    """(image, label) of every row; upstream stores all red pixels first, then all green and all blue ones."""
    planes = (image.reshape(3, 32, 32) for one in batches for image in one["data"])
    labels = (label for one in batches for label in one[key])
    return sorted((np.stack(list(p), axis=-1).tobytes(), label) for p, label in zip(planes, labels, strict=True))


def pairs(images, labels):
    images = np.rint(images * 255).astype(np.uint8)
    return sorted((image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True))


def test_images_and_labels_match_the_archive(upstream, tmp_path, capfd):
    name, train, test = upstream
    data = load(name, data_dir=tmp_path / "data")
    key = "labels" if name == "cifar10" else "fine_labels"
    assert data.num_classes == (10 if name == "cifar10" else 100)
    assert data.train_images.shape == (ROWS * len(train), 32, 32, 3)
    assert pairs(data.train_images, data.train_labels) == rows(train, key)
    assert pairs(data.test_images, data.test_labels) == rows([test], key)
    assert capfd.readouterr() == ("", "")


def test_the_stock_reader_finds_ids_all_labels_and_their_names(upstream, tmp_path):
    name, train, _ = upstream
    cifar.prepare(name, tmp_path / "data")
    source = tfds.data_source(name, split="train", data_dir=tmp_path / "data", download=False)
    features = source.dataset_info.features
    assert features["label"].names == meta(name)["label_names" if name == "cifar10" else "fine_label_names"]
    found = {example["id"]: example for example in source}
    assert sorted(found) == [f"train_{k:05d}".encode() for k in range(ROWS * len(train))]
    first = train[0]["data"][1].reshape(3, 32, 32)
    np.testing.assert_array_equal(found[b"train_00001"]["image"], np.moveaxis(first, 0, -1))
    if name == "cifar100":
        assert features["coarse_label"].names[19] == "group19"
        assert found[b"train_00001"]["coarse_label"] == train[0]["coarse_labels"][1]
    assert tfds.builder_cls(name).__module__.startswith("tensorflow_datasets.")


def test_prepared_data_do_not_need_the_archive(upstream, tmp_path, monkeypatch):
    name, *_ = upstream
    expected = load(name, data_dir=tmp_path / "data")
    monkeypatch.setenv(cifar.SOURCE_VARIABLE, str(tmp_path / "nowhere"))
    np.testing.assert_array_equal(load(name, data_dir=tmp_path / "data").train_images, expected.train_images)


def test_another_archive_is_refused_before_it_is_unpickled(upstream, tmp_path, monkeypatch):
    name, *_ = upstream
    monkeypatch.setitem(cifar.ARCHIVES, name, cifar.ARCHIVES[name]._replace(sha256="0" * 64))
    monkeypatch.setattr(pickle, "load", lambda *args, **kwargs: pytest.fail("unpickled"))
    with pytest.raises(ValueError, match=r"got SHA-256 [0-9a-f]{64}, expected upstream's 0{64}; the file is damaged$"):
        load(name, data_dir=tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_a_missing_archive_is_reported(tmp_path, monkeypatch):
    monkeypatch.setenv(cifar.SOURCE_VARIABLE, str(tmp_path))
    with pytest.raises(FileNotFoundError) as caught:
        load("cifar10", data_dir=tmp_path / "data")
    assert str(caught.value) == (
        f"cifar-10-python.tar.gz: not found in {tmp_path}; set EUPMU_CIFAR to the folder that holds it"
    )
    assert not (tmp_path / "data").exists()
