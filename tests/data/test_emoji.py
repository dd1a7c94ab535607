import hashlib
import io
import json
import re
import tarfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from eupmu_jax.data import emoji, load

TONES = ("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF")


def draw(seed):
    """A 64x64 picture on a transparent background."""
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[16:48, 16:48] = [*np.random.default_rng(seed).integers(0, 256, 3), 255]
    return Image.fromarray(pixels)


def image(code):
    return {"unified": code, "image": f"{code.lower()}.png", "has_img_twitter": True}


def entry(code, category, **more):
    return image(code) | {"name": f"NAME {code}", "category": category} | more


@pytest.fixture
def package(tmp_path):
    """A small package as unpacked by npm, with four emoji in every category and skin tones for people."""
    folder = tmp_path / "package"
    images = folder / "img" / "twitter" / "64"
    images.mkdir(parents=True)
    entries = []
    for number, category in enumerate([*emoji.CATEGORIES, "Component"]):
        for code in (f"1F{number:X}{k:02X}" for k in range(4)):
            drawn = {}
            if category == "People & Body":
                drawn = {"skin_variations": {tone: image(f"{code}-{tone}") for tone in TONES}}
            entries.append(entry(code, category, **drawn))
    entries.append(entry("1FFFF", "Flags", has_img_twitter=False))
    shown_ones = [shown for one in entries for shown in (one, *one.get("skin_variations", {}).values())]
    for number, shown in enumerate(shown_ones):
        if shown["has_img_twitter"]:
            draw(number).save(images / shown["image"])
    (folder / "emoji.json").write_text(json.dumps(entries))
    (folder / "package.json").write_text(json.dumps({"name": emoji.PACKAGE, "version": emoji.PACKAGE_VERSION}))
    return folder


def tarball(package, path):
    with tarfile.open(path, "w:gz") as tar:
        tar.add(package, "package")
    return path


def test_folder_and_tarball_give_every_image_once_with_its_category(package, tmp_path, monkeypatch, capfd):
    found = []
    for source in (package, tarball(package, tmp_path / "emoji.tgz")):
        monkeypatch.setenv(emoji.SOURCE_VARIABLE, str(source))
        found.append(load("emoji", data_dir=tmp_path / f"data-{source.name}"))
    assert capfd.readouterr() == ("", "")
    for left, right in zip(*found, strict=True):
        np.testing.assert_array_equal(left, right)
    data = found[0]
    assert (data.name, data.num_classes) == ("emoji", 9)
    images = np.concatenate([data.train_images, data.test_images])
    labels = np.concatenate([data.train_labels, data.test_labels])
    assert images.shape == (9 * 4 + 4 * len(TONES), 64, 64, 3)
    assert images.dtype == np.float32
    assert labels.dtype == np.int32
    assert np.bincount(labels).tolist() == [24 if name == "People & Body" else 4 for name in emoji.CATEGORIES]
    assert len(np.unique(images, axis=0)) == len(images)


def test_named_emoji_have_no_skin_tone_and_half_the_size(package, tmp_path, monkeypatch):
    monkeypatch.setenv(emoji.SOURCE_VARIABLE, str(package))
    named = emoji.named(tmp_path)
    data = load("emoji_32", data_dir=tmp_path)
    assert sum(len(names) for _, names in named.values()) == 9 * 4
    for side, whole in (("train", data.train_images), ("test", data.test_images)):
        images, names = named[side]
        assert images.shape == (len(names), 32, 32, 3)
        assert {image.tobytes() for image in images} <= {image.tobytes() for image in whole}


def test_the_background_is_white_and_semi_transparent_colours_are_blended_with_it():
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    image.paste((255, 0, 0, 128), (0, 0, 32, 64))
    file = io.BytesIO()
    image.save(file, "png")
    shown = emoji._on_white(file.getvalue())
    assert shown[0, 63].tolist() == [255, 255, 255]
    np.testing.assert_allclose(shown[0, 0], [255, 127, 127], atol=1)


def examples(names, images=None):
    images = range(len(names)) if images is None else images
    drawn = [np.full((64, 64, 3), image, np.uint8) for image in images]
    return [emoji.Example(f"{n}-{k}", n, n, "Flags", drawn[k]) for k, n in enumerate(names)]


def test_the_side_follows_the_hash_of_the_code_points():
    names = [f"1F{k:03X}" for k in range(200)]
    split = emoji.sides(examples(names))
    # A fifth of 2^64 is 3333... in hexadecimal.
    expected = {name for name in names if hashlib.sha256(name.encode()).hexdigest() < "3" * 16}
    assert {example.emoji for example in split["test"]} == expected
    assert 20 < len(expected) < 60


def test_skin_tones_and_equal_pictures_stay_together_whatever_the_order():
    names = [f"1F{k // 3:03X}" for k in range(150)]
    # Emoji 0 and 7 share a picture, and 7 and 9 share another, so all three form one group.
    images = list(range(150))
    images[21], images[28] = images[2], images[23]
    given = examples(names, images)
    split = emoji.sides(given)
    sides = {side: {example.emoji for example in split[side]} for side in split}
    assert not sides["train"] & sides["test"]
    assert any({names[0], names[21], names[27]} <= side for side in sides.values())
    backwards = emoji.sides(given[::-1])
    assert {example.id for example in backwards["test"]} == {example.id for example in split["test"]}
    assert len(split["test"]) + len(split["train"]) == 150


def test_a_missing_package_is_reported(tmp_path, monkeypatch):
    monkeypatch.delenv(emoji.SOURCE_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(FileNotFoundError) as caught:
        load("emoji", data_dir=tmp_path / "data")
    folder, file = tmp_path / "cache" / "eupmu", "emoji-datasource-twitter-16.0.0.tgz"
    assert str(caught.value) == (
        f"emoji: no {folder / file}; with a network run `npm pack emoji-datasource-twitter@16.0.0`, "
        f"then move {file} to {folder} or set EUPMU_EMOJI to it"
    )
    assert not (tmp_path / "data").exists()


def test_the_package_is_found_in_the_cache(package, tmp_path, monkeypatch):
    monkeypatch.delenv(emoji.SOURCE_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "eupmu").mkdir()
    tarball(package, tmp_path / "eupmu" / "emoji-datasource-twitter-16.0.0.tgz")
    assert load("emoji", data_dir=tmp_path / "data").num_classes == 9


def test_another_version_and_another_folder_are_refused(package, tmp_path, monkeypatch):
    monkeypatch.setenv(emoji.SOURCE_VARIABLE, str(package))
    (package / "package.json").write_text('{"version": "15.1.2"}')
    with pytest.raises(ValueError, match=re.escape("got version 15.1.2, expected emoji-datasource-twitter@16.0.0")):
        load("emoji", data_dir=tmp_path / "data")
    monkeypatch.setenv(emoji.SOURCE_VARIABLE, str(package / "img"))
    with pytest.raises(FileNotFoundError, match=r"no package\.json and emoji\.json in"):
        load("emoji", data_dir=tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    try:
        emoji._source()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    data_dir = tmp_path_factory.mktemp("real")
    emoji.prepare(data_dir)
    return data_dir


@pytest.mark.slow
def test_the_real_package_can_be_loaded(real):
    data = load("emoji", data_dir=real)
    counts = np.bincount(data.train_labels), np.bincount(data.test_labels)
    assert [int(c.sum()) for c in counts] == [3082, 699]
    assert dict(zip(emoji.CATEGORIES, sum(counts).tolist(), strict=True)) == {
        "Activities": 85,
        "Animals & Nature": 159,
        "Flags": 270,
        "Food & Drink": 131,
        "Objects": 264,
        "People & Body": 2261,
        "Smileys & Emotion": 169,
        "Symbols": 224,
        "Travel & Places": 218,
    }
    trained = {image.tobytes() for image in data.train_images}
    assert not any(image.tobytes() in trained for image in data.test_images)


@pytest.mark.slow
def test_the_stock_reader_can_read_the_real_package(real):
    train, test = tfds.data_source("emoji", split=["train", "test"], data_dir=real, download=False)
    sides = [{example["emoji"] for example in source} for source in (train, test)]
    assert not sides[0] & sides[1]
    names = {example["name"].decode() for source in (train, test) for example in source}
    assert {"GRINNING FACE", "FATHER CHRISTMAS", "HASH KEY"} <= names
