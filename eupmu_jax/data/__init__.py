"""Data sets of images and of questions, and their splits into forget and retain sets."""

from eupmu_jax.data.augmentation import augment
from eupmu_jax.data.dataset import Dataset, load
from eupmu_jax.data.splits import Split, digest, load_split, save_split, split

__all__ = ["Dataset", "Split", "augment", "digest", "load", "load_split", "save_split", "split"]
