"""A fingerprint of a tree of arrays, which reveals a damaged checkpoint."""

import hashlib

import chex
import jax
import numpy as np

from eupmu_jax._stack.programs import fetched


def digest(tree: chex.ArrayTree) -> str:
    """SHA-256 in hex of every leaf's path, dtype, shape and bytes; the same in all processes that share the tree.

    >>> digest({"w": np.ones(2)}) == digest({"w": np.ones(2)}), digest({"w": np.ones(2)}) == digest({"v": np.ones(2)})
    (True, False)
    """
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = fetched(numbers_of(leaf))
        found.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        found.update(np.ascontiguousarray(array).view(np.uint8).data if array.size else b"")
    return found.hexdigest()


def numbers_of(leaf: chex.Array) -> chex.Array:
    """The numbers of a typed key of JAX; any other array as it is.

    >>> numbers_of(jax.random.key(3)).tolist(), numbers_of(np.ones(2)).tolist()
    ([0, 3], [1.0, 1.0])
    """
    is_key = jax.dtypes.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if is_key else leaf
