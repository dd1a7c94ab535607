"""Checks of parameters that a task or a run closes over, and a warning where they are large."""

import logging

import chex
import jax
import jax.numpy as jnp
import numpy as np

from eupmu_jax._stack.algebra import is_finite

logger = logging.getLogger("eupmu_jax")

# In bytes; from this size on, compilation takes minutes.
LARGE = 100_000_000


def bytes_of(tree: chex.ArrayTree) -> int:
    """Bytes of a tree, as JAX would hold it.

    >>> bytes_of({"w": np.zeros(3)})
    12
    """
    return sum(np.size(leaf) * jnp.result_type(leaf).itemsize for leaf in jax.tree.leaves(tree))


def of_large(name: str, constants: chex.ArrayTree) -> None:
    """Warns of large constants if JAX copies what a function closes over into every compiled program."""
    if getattr(jax.config, "jax_use_simplified_jaxpr_constants", True):
        return
    if (size := bytes_of(constants)) > LARGE:
        logger.warning(
            "%s: got %.2g GB, which every compiled program holds a copy of; set the environment variable "
            "JAX_USE_SIMPLIFIED_JAXPR_CONSTANTS=1 to have JAX pass them as arguments",
            name,
            size / 1e9,
        )


def check_constants(name: str, constants: chex.ArrayTree) -> None:
    """Raises `ValueError` for numbers that are not finite, and warns `of_large` ones; traced values pass.

    >>> check_constants("original", {"w": np.array([np.nan])})
    Traceback (most recent call last):
    ValueError: original: leaf ['w'] has numbers that are not finite, expected those of a trained model
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(constants):
        is_here = isinstance(leaf, jax.Array | np.ndarray | float) and not isinstance(leaf, jax.core.Tracer)
        if is_here and jnp.issubdtype(jnp.result_type(leaf), jnp.floating) and not is_finite(leaf):
            where = jax.tree_util.keystr(path)
            raise ValueError(f"{name}: leaf {where} has numbers that are not finite, expected those of a trained model")
    of_large(name, constants)
