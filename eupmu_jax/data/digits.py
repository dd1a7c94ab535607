"""scikit-learn's handwritten digits: 1,797 8x8 images that come with the package."""

import numpy as np


def load(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Loads the digits, with one image in five of every class held out for testing.

    Args:
      seed: chooses which images are held out.

    Returns:
      train_images (1437, 8, 8, 1) float32 in [0, 1], train_labels (1437,) int32, test_images (360, 8, 8, 1) float32,
      test_labels (360,) int32.

    >>> train_images, train_labels, _, _ = load(seed=0)
    >>> train_images.shape, np.bincount(train_labels)[:4].tolist()
    ((1437, 8, 8, 1), [142, 146, 142, 146])
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    images = (bunch.images / 16).astype(np.float32)[..., np.newaxis]
    labels = bunch.target.astype(np.int32)
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, labels, test_size=0.2, stratify=labels, random_state=seed
    )
    return train_images, train_labels, test_images, test_labels
