"""Emoji: 3,781 colour images of 64x64 in nine categories, from an npm package, through tensorflow-datasets.

The images are Twemoji's, under CC BY 4.0 (Twitter and other contributors), from `emoji-datasource-twitter` 16.0.0; this
package ships none. Their transparent background becomes white. The label is the category in the Unicode standard; the
five swatches of the category "Component" are left out. Three in five images are people.

A hash of the code points assigns one emoji in five to the test set, so the split never changes. All skin tones of an
emoji are on one side, and so are emoji with identical pictures (some flags and families), so no test image is in the
training set in another tone or under another name.
"""

import hashlib
import io
import json
import os
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from eupmu_jax.data import stock

SOURCE_VARIABLE = "EUPMU_EMOJI"
PACKAGE, PACKAGE_VERSION = "emoji-datasource-twitter", "16.0.0"
CATEGORIES = (
    "Activities",
    "Animals & Nature",
    "Flags",
    "Food & Drink",
    "Objects",
    "People & Body",
    "Smileys & Emotion",
    "Symbols",
    "Travel & Places",
)
SIZE = 64
_IMAGES = f"img/twitter/{SIZE}/"


class Example(NamedTuple):
    """One image.

    Attributes:
      id: its code points.
      emoji: the code points of the emoji of which it is a skin tone, or its own.
      name, category: name and category in words.
      image: (64, 64, 3) uint8.
    """

    id: str
    emoji: str
    name: str
    category: str
    image: np.ndarray


def load(data_dir: str | os.PathLike[str] | None) -> stock.Arrays:
    """Loads the emoji, preparing them first if necessary.

    Args:
      data_dir: folder of the prepared data; None means the default of tensorflow-datasets.

    Returns:
      train_images (N, 64, 64, 3) float32 in [0, 1], train_labels (N,) int32 indices into `CATEGORIES`, test_images
      (M, 64, 64, 3) float32, test_labels (M,) int32, in the order of tensorflow-datasets.

    Raises:
      FileNotFoundError: if the data is not prepared and the npm package is not on this machine.
      ValueError: if the package is of another version.
    """
    with stock.quiet_log():
        return stock.arrays(_prepared(data_dir), SIZE)


def named(data_dir: str | os.PathLike[str] | None) -> dict[str, tuple[np.ndarray, list[str]]]:
    """Images of half the height and width in [0, 1], `(N, 32, 32, 3)`, and names, for "train" and "test".

    An emoji with skin tones is included only in the version without one. The rest is as in `load`.
    """
    with stock.quiet_log():
        sources = _prepared(data_dir)
        kept = [[record for record in source if record["id"] == record["emoji"]] for source in sources]
    images = [_halved(np.stack([record["image"] for record in side]) / np.float32(255)) for side in kept]
    names = [[record["name"].decode() for record in side] for side in kept]
    return dict(zip(("train", "test"), zip(images, names, strict=True), strict=True))


def halved(train_images, train_labels, test_images, test_labels) -> stock.Arrays:
    """The same arrays with images of half the height and width, each pixel the mean of four."""
    return _halved(train_images), train_labels, _halved(test_images), test_labels


def prepare(data_dir: str | os.PathLike[str] | None) -> None:
    """Writes the emoji to `data_dir` atomically, from the npm package.

    The tarball, or a folder unpacked from it, is looked up at the path in the environment variable EUPMU_EMOJI, or else
    as a tarball in the folder `eupmu` of the user's cache (XDG_CACHE_HOME, or else ~/.cache).

    Args:
      data_dir: folder to write to; None means the default of tensorflow-datasets.

    Raises:
      FileNotFoundError: if there is no package.
      ValueError: if the package is of another version.
    """
    examples = sides(_examples(_read_package(_source())))
    with tempfile.TemporaryDirectory() as folder:
        with stock.quiet_log():
            builder = _builder(data_dir, examples)
        stock.write(builder, Path(folder))


def sides(examples: list[Example]) -> dict[str, list[Example]]:
    """Splits the examples into "train" and "test", independently of their order.

    Emoji that share an image form a group. The group goes to the test set if the first eight bytes of the SHA-256 of
    the id of its first member, in the order of code points, read as a fraction, are below 1/5.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    names, emoji = np.unique([example.emoji for example in examples], return_inverse=True)
    _, image = np.unique([example.image.tobytes() for example in examples], return_inverse=True)
    size = len(names) + image.max() + 1
    edges = coo_array((np.ones(len(examples)), (emoji, image + len(names))), shape=(size, size))
    _, group = connected_components(edges, directed=False)
    _, first = np.unique(group[: len(names)], return_index=True)
    tested = [int.from_bytes(hashlib.sha256(names[k].encode()).digest()[:8]) < 2**64 // 5 for k in first]
    split: dict[str, list[Example]] = {"train": [], "test": []}
    for example, its in zip(examples, group[emoji], strict=True):
        split["test" if tested[its] else "train"].append(example)
    return split


def _halved(images):
    return images.reshape(len(images), SIZE // 2, 2, SIZE // 2, 2, 3).mean((2, 4))


def _prepared(data_dir):
    """Both splits, as tensorflow-datasets reads them."""
    with stock.quiet_log():
        prepared = _builder(data_dir, {}).is_prepared()
    if not prepared:
        prepare(data_dir)
    return _builder(data_dir, {}).as_data_source(split=["train", "test"])


def _source() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "eupmu"
    tarball = f"{PACKAGE}-{PACKAGE_VERSION}.tgz"
    source = Path(os.environ.get(SOURCE_VARIABLE) or cache / tarball)
    if not source.exists():
        raise FileNotFoundError(
            f"emoji: no {source}; with a network run `npm pack {PACKAGE}@{PACKAGE_VERSION}`, then move {tarball} to "
            f"{cache} or set {SOURCE_VARIABLE} to it"
        )
    return source


def _read_package(source: Path) -> dict[str, bytes]:
    """The needed files of the tarball or folder, by their paths in the package."""
    wanted = lambda name: name in ("package.json", "emoji.json") or name.startswith(_IMAGES)
    if source.is_dir():
        paths = {path.relative_to(source).as_posix(): path for path in source.rglob("*") if path.is_file()}
        files = {name: path.read_bytes() for name, path in paths.items() if wanted(name)}
    else:
        with tarfile.open(source) as tar:
            members = ((member, member.name.removeprefix("package/")) for member in tar if member.isfile())
            files = {name: tar.extractfile(member).read() for member, name in members if wanted(name)}  # type: ignore[union-attr]
    if "package.json" not in files or "emoji.json" not in files:
        raise FileNotFoundError(f"emoji: no package.json and emoji.json in {source}; expected both, as in {PACKAGE}")
    if (version := json.loads(files["package.json"])["version"]) != PACKAGE_VERSION:
        raise ValueError(f"{source}: got version {version}, expected {PACKAGE}@{PACKAGE_VERSION}")
    return files


def _examples(files: dict[str, bytes]) -> list[Example]:
    found = []
    for entry in json.loads(files["emoji.json"]):
        if entry["category"] not in CATEGORIES:
            continue
        for drawn in (entry, *entry.get("skin_variations", {}).values()):
            if drawn["has_img_twitter"]:
                image = _on_white(files[_IMAGES + drawn["image"]])
                found.append(Example(drawn["unified"], entry["unified"], entry["name"], entry["category"], image))
    return found


def _on_white(png: bytes) -> np.ndarray:
    from PIL import Image

    image = Image.open(io.BytesIO(png)).convert("RGBA")
    return np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB"))


def _builder(data_dir: str | os.PathLike[str] | None, examples: dict[str, list[Example]]) -> Any:
    import tensorflow_datasets as tfds
    from PIL import Image

    class Emoji(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        """The emoji, with their names."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(
                builder=self,
                description=f"Twemoji of the npm package {PACKAGE} {PACKAGE_VERSION} on white, by category.",
                features=tfds.features.FeaturesDict(
                    {
                        "id": tfds.features.Text(),
                        "emoji": tfds.features.Text(),
                        "name": tfds.features.Text(),
                        "image": tfds.features.Image(shape=(SIZE, SIZE, 3), encoding_format="png"),
                        "label": tfds.features.ClassLabel(names=list(CATEGORIES)),
                    }
                ),
                supervised_keys=("image", "label"),
                license="CC BY 4.0, Twitter and other contributors",
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {side: self._generate_examples(side) for side in ("train", "test")}

        def _generate_examples(self, side: str) -> Iterator[tuple[str, dict]]:
            for example in examples[side]:
                # A PIL image encodes itself; an array would be encoded with TensorFlow.
                record = example._asdict() | {"image": Image.fromarray(example.image)}
                yield example.id, record | {"label": record.pop("category")}

    return Emoji(data_dir=data_dir)
