"""Image classification data sets, and their split into what to forget and what to retain."""

from eupmu_jax.data.dataset import Dataset, load
from eupmu_jax.data.splits import Split, digest, split

__all__ = ["Dataset", "Split", "digest", "load", "split"]
