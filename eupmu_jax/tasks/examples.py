"""Sets of examples that batches are taken from, whatever holds them."""

import dataclasses
import operator
from typing import Any

import chex
import jax
import numpy as np

from eupmu_jax._stack.checks import describe

# 1, with a margin for rounding.
ROUNDED = 1.001
# The most leaves that an error lists.
NAMED = 8


# One program; without `jit` each operation of indexing is compiled and started on its own.
_rows = jax.jit(operator.getitem)


def rows_of(tree: chex.ArrayTree, ids: np.ndarray) -> chex.ArrayTree:
    """The rows `ids` of every leaf, on the device for arrays of JAX and on the host for others.

    >>> rows_of({"x": np.arange(5) * 10}, np.array([4, 1]))["x"].tolist()
    [40, 10]
    """
    return jax.tree.map(lambda leaf: _rows(leaf, ids) if isinstance(leaf, jax.Array) else leaf[ids], tree)


@dataclasses.dataclass(frozen=True)
class Examples:
    """Some examples of a tree of arrays, `(N, ...)` in every leaf; `examples[positions]` is a batch.

    Attributes:
      tree: The arrays. Two sets may share them.
      ids: Which of the N, `(n,)` ints, in the order of the set.

    >>> examples = Examples({"x": np.arange(5) * 10}, np.array([4, 1]))
    >>> len(examples), examples[np.array([0, 1, 0])]["x"].tolist()
    (2, [40, 10, 40])
    """

    tree: chex.ArrayTree
    ids: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, positions) -> chex.ArrayTree:
        return rows_of(self.tree, self.ids[np.asarray(positions)])


@dataclasses.dataclass(frozen=True)
class Part:
    """Some examples of a source that gives batches for positions.

    Attributes:
      source: Anything with `source[positions] -> batch`.
      ids: Its positions, `(n,)` ints.
    """

    source: Any
    ids: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, positions) -> chex.ArrayTree:
        return self.source[self.ids[np.asarray(positions)]]


def part_of(examples: Any, positions: np.ndarray) -> Any:
    """The examples at these positions of a set, as `as_examples` returns it."""
    if isinstance(examples, Examples):
        return Examples(examples.tree, examples.ids[positions])
    if isinstance(examples, Part):
        return Part(examples.source, examples.ids[positions])
    return Part(examples, np.asarray(positions))


def as_examples(name: str, data: Any) -> Any:
    """`data` as an object with a length that gives a batch for an array of positions.

    Args:
      name: Of the argument, for errors.
      data: A tree of arrays with one leading axis, or anything with `len(data)` and `data[positions] -> batch`, where
        `positions` are `(m,)` ints.

    Raises:
      ValueError: For an empty set, leaves of unequal lengths or that do not hold numbers, ids that the tree does not
        have, or a source whose batches do not have the requested length.

    >>> len(as_examples("forget", {"x": np.zeros((7, 2)), "y": np.zeros(7)}))
    7
    """
    if isinstance(data, Examples):
        data = Examples(data.tree, np.asarray(data.ids))
        length = len(data)
        _check_ids(name, data.ids, _length(name, data.tree))
    elif _is_tree_of_arrays(data):
        # A column of pandas gives rows by label, not by position, and neither it nor a tensor is an array for JAX.
        is_foreign = lambda leaf: hasattr(leaf, "__array__") and not isinstance(leaf, jax.Array)
        data = jax.tree.map(lambda leaf: np.asarray(leaf) if is_foreign(leaf) else leaf, data)
        length = _length(name, data)
        data = Examples(data, np.arange(length))
    elif hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        length = len(data)
        if length:
            _check_source(name, data)
    else:
        raise ValueError(
            f"{name}: got {type(data).__name__}, expected a tree of arrays with one leading axis, or an object with "
            "len(data) and data[positions]"
        )
    if not length:
        raise ValueError(f"{name}: got an empty set, expected at least one example")
    return data


def spread(count: int, most: int) -> np.ndarray:
    """At most `most` positions, spread over the whole of a set, which may be sorted.

    >>> spread(7, 3).tolist(), spread(2, 3).tolist()
    ([0, 2, 4], [0, 1])
    """
    chosen = min(most, count)
    return np.arange(chosen) * count // chosen


def check_images(name: str, images: chex.Array, furthest: float | None, otherwise: str = "") -> None:
    """Raises `ValueError` for images that go beyond [-furthest, furthest], or for numbers that are not finite.

    Args:
      name: Of the argument, for errors.
      images: Of any shape; traced ones have no values yet, and pass.
      furthest: None accepts all finite numbers.
      otherwise: What else would do, for errors.

    >>> check_images("start", np.array([0.0, 255.0]), ROUNDED)
    Traceback (most recent call last):
    ValueError: start: got images from 0 to 255, expected numbers in [-1, 1]
    """
    if isinstance(images, jax.core.Tracer) or not np.size(images):
        return
    # In NumPy, since inside another trace JAX would trace the minimum of concrete images too.
    images = np.asarray(images)
    least, most = float(images.min()), float(images.max())
    if furthest is not None and not (least >= -furthest and most <= furthest):
        raise ValueError(f"{name}: got images from {least:g} to {most:g}, expected numbers in [-1, 1]{otherwise}")
    if not np.isfinite([least, most]).all():
        raise ValueError(f"{name}: got numbers from {least:g} to {most:g}, expected finite ones")


def check_labels(labels: chex.Array, count: int, name: str = "labels") -> None:
    """Raises `ValueError` for labels, or what `name` says, that are not ints in [0, count); traced ones pass.

    >>> check_labels(np.array([0, 3]), 3)
    Traceback (most recent call last):
    ValueError: labels: got 3, expected ints from 0 to 2
    """
    if isinstance(labels, jax.core.Tracer):
        return
    labels = np.asarray(labels)
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{name}: got {labels.dtype}, expected ints from 0 to {count - 1}")
    if len(missing := labels[(labels < 0) | (labels >= count)]):
        raise ValueError(f"{name}: got {missing[0]}, expected ints from 0 to {count - 1}")


def _is_tree_of_arrays(data):
    leaves = jax.tree.leaves(data)
    return bool(leaves) and all(hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves)


def _length(name, tree):
    lengths = {jax.tree_util.keystr(path): leaf.shape[:1] for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    if len(set(lengths.values())) != 1 or () in lengths.values():
        some = dict(list(lengths.items())[:NAMED])
        advice = "; stack a list of examples into one tree of arrays" if isinstance(tree, list | tuple) else ""
        wanted = f"the same number of examples in all{advice}"
        raise ValueError(f"{name}: leaves have leading axes {some}, expected {wanted}")
    _check_numbers(name, tree)
    ((length,),) = set(lengths.values())
    return length


def _check_numbers(name, tree):
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not isinstance(leaf, np.ndarray):
            continue
        given = f"{name}: leaf {describe(path)} is of type {leaf.dtype}"
        # Objects, bytes, texts, dates, durations and records, which no JAX array can hold.
        if leaf.dtype.kind in "OSUMm" or leaf.dtype.names:
            raise ValueError(f"{given}, expected numbers; leave other columns out")
        if not leaf.dtype.isnative:
            native = leaf.dtype.newbyteorder("=")
            raise ValueError(f"{given}, expected the byte order of this machine, as after .astype({str(native)!r})")


def _check_ids(name, ids, length):
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        raise ValueError(f"{name}: got ids of shape {ids.shape} and type {ids.dtype}, expected (n,) ints")
    if len(missing := ids[(ids < 0) | (ids >= length)]):
        raise ValueError(f"{name}: got id {missing[0]}, expected ids from 0 to {length - 1}")


def _check_source(name, data):
    try:
        batch = data[np.zeros(2, int)]
    except (TypeError, ValueError, KeyError, IndexError) as error:
        raise ValueError(
            f"{name}: got {type(data).__name__}, {_why_no_batch(data, error)}; expected a tree of arrays with one "
            "leading axis, or an object with len(data) and data[positions]"
        ) from error
    if lists := [leaf for leaf in jax.tree.leaves(batch) if not hasattr(leaf, "shape")]:
        kind = type(lists[0]).__name__
        raise ValueError(f"{name}: data[positions] gave leaves of type {kind}, expected a tree of arrays, not of lists")
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(batch)]
    if not shapes or any(shape[:1] != (2,) for shape in shapes):
        some = str(shapes[:NAMED])
        raise ValueError(f"{name}: data[positions] gave leaves of shapes {some} for 2 positions, expected (2, ...)")
    _check_numbers(name, batch)


def _why_no_batch(data, error):
    if isinstance(data, dict | list | tuple):
        for path, leaf in jax.tree_util.tree_leaves_with_path(data):
            if not _is_tree_of_arrays(leaf):
                return f"whose leaf {jax.tree_util.keystr(path)} is {type(leaf).__name__}, no array"
    return f"which gives no batch for an array of positions ({type(error).__name__}: {error})"
