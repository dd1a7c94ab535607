import re
import subprocess
import sys

import numpy as np
import pytest

from eupmu_jax.data import Dataset, dataset, load


def test_the_error_for_an_unknown_name_lists_the_known_ones():
    known = "digits, fashion_mnist, cifar10, cifar100, svhn_cropped, imagenette, emoji, emoji_32"
    with pytest.raises(ValueError, match=rf"^name: got 'mnist', expected one of {known}$"):
        load("mnist")
    # The first column of the table in the docstring.
    first = re.findall(r"^ *\| ([a-z].*?) \|", load.__doc__, re.MULTILINE)
    assert ", ".join(first) == f"name, {known}"


def test_importing_the_package_is_light():
    heavy = {"sklearn", "scipy", "tensorflow_datasets", "PIL"}
    check = f"import sys, eupmu_jax.data; print(sorted({heavy} & sys.modules.keys()))"
    found = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


def small(**changed):
    images, labels = np.arange(12, dtype=np.float32).reshape(3, 2, 2, 1), np.array([0, 1, 2], np.int32)
    return Dataset("small", images, labels, images[:2], labels[:2], 3)._replace(**changed)


def test_the_digest_of_a_dataset_is_fixed():
    # The digest is stored with splits, so it must not change between versions or platforms.
    assert dataset.digest(small()) == "e00feadb2546ae1510c754edd800cec031d283d1fcba0fac5098eea95cc687f3"


@pytest.mark.parametrize(
    "changed",
    [
        {"train_images": small().train_images.reshape(3, 1, 4, 1)},
        {"train_images": small().train_images.astype(np.float64)},
        {"train_labels": small().train_labels[[1, 0, 2]]},
        {"test_images": small().test_images[::-1]},
        {"test_labels": small().test_labels + 1},
        {"num_classes": 4},
    ],
)
def test_the_digest_depends_on_every_part(changed):
    assert dataset.digest(small(**changed)) != dataset.digest(small())


def test_the_digest_depends_on_values_and_not_on_their_memory_layout():
    images = small().train_images
    same = [np.asfortranarray(images), images.astype(">f4"), np.repeat(images, 2, axis=0)[::2]]
    assert {dataset.digest(small(train_images=other)) for other in same} == {dataset.digest(small())}
