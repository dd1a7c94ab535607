"""Trees in two parts, one of them frozen; each part has None in place of the other."""

import inspect
from typing import Any

import chex
import jax
import numpy as np

from eupmu_jax._stack import checks


def mask_of(params: chex.ArrayTree, frozen: Any) -> Any:
    """The tree of bools, True where frozen, that `frozen` is or returns for the parameters; all False for None.

    Raises:
      ValueError: For a function of other arguments, a tree whose structure is not that of the parameters, one of
        anything but bools known before tracing, and one that freezes all parameters.

    >>> mask_of({"body": 1.0, "head": 2.0}, lambda params: {name: name == "body" for name in params})
    {'body': True, 'head': False}
    """
    if frozen is None:
        return jax.tree.map(lambda _: False, params)
    if inspect.isfunction(frozen):
        try:
            inspect.signature(frozen).bind(params)
        except TypeError:
            taken = inspect.signature(frozen)
            raise ValueError(f"frozen: got a function of {taken}, expected one of params alone") from None
    mask = frozen(params) if callable(frozen) else frozen
    checks.check_same_structure("frozen", mask, "params", params)
    for path, flag in jax.tree_util.tree_leaves_with_path(mask):
        if checks.is_traced(flag) or np.shape(flag) or np.asarray(flag).dtype != bool:
            found = f"an array of shape {np.shape(flag)}" if np.shape(flag) else repr(flag)
            raise ValueError(
                f"frozen: leaf {checks.describe(path)} is {found}, expected True or False, known before tracing"
            )
    if all(jax.tree.leaves(mask)):
        raise ValueError("frozen: every leaf is frozen, expected at least one trainable leaf")
    return mask


def split(mask: Any, tree: chex.ArrayTree) -> tuple[chex.ArrayTree, chex.ArrayTree]:
    """The trainable and the frozen part.

    >>> split({"body": True, "head": False}, {"body": 1.0, "head": 2.0})
    ({'body': None, 'head': 2.0}, {'body': 1.0, 'head': None})
    """
    part = lambda wanted: jax.tree.map(lambda is_frozen, leaf: leaf if is_frozen == wanted else None, mask, tree)
    return part(False), part(True)


def joined(free: chex.ArrayTree, fixed: chex.ArrayTree) -> chex.ArrayTree:
    """The tree of both parts.

    >>> joined({"body": None, "head": 2.0}, {"body": 1.0, "head": None})
    {'body': 1.0, 'head': 2.0}
    """
    return jax.tree.map(lambda a, b: b if a is None else a, free, fixed, is_leaf=lambda leaf: leaf is None)
