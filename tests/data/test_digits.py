import numpy as np
from sklearn.datasets import load_digits

from eupmu_jax.data import load


def test_images_have_the_documented_shapes_and_range():
    data = load("digits")
    assert data.name == "digits"
    assert data.num_classes == 10
    assert data.train_images.shape == (1437, 8, 8, 1)
    assert data.test_images.shape == (360, 8, 8, 1)
    for images, labels in ((data.train_images, data.train_labels), (data.test_images, data.test_labels)):
        assert images.dtype == np.float32
        assert labels.dtype == np.int32
        assert labels.shape == images.shape[:1]
        assert images.min() == 0
        assert images.max() == 1


def test_every_image_occurs_once_with_its_label():
    data = load("digits", seed=3)
    images = np.concatenate([data.train_images, data.test_images])[..., 0] * 16
    labels = np.concatenate([data.train_labels, data.test_labels])
    bunch = load_digits()
    expected = sorted((image.tobytes(), int(label)) for image, label in zip(bunch.images, bunch.target, strict=True))
    assert sorted((i.tobytes(), int(k)) for i, k in zip(images.astype(np.float64), labels, strict=True)) == expected


def test_split_is_stratified():
    data = load("digits")
    train, test = np.bincount(data.train_labels), np.bincount(data.test_labels)
    np.testing.assert_allclose(test / (train + test), 0.2, atol=0.01)


def test_the_seed_determines_the_split():
    first, again, other = load("digits", seed=1), load("digits", seed=1), load("digits", seed=2)
    np.testing.assert_array_equal(first.test_images, again.test_images)
    np.testing.assert_array_equal(first.train_labels, again.train_labels)
    assert not np.array_equal(first.test_images, other.test_images)
