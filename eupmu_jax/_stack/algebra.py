"""Algebra of stacked trees: pytrees whose leaves carry one gradient for each objective along axis 0.

Row 0 is the forget objective, rows 1 to K-1 are the retain constraints. Everything a stacked transform needs from the
model is here: the number of objectives, the K x K Gram matrix, and a weighted sum of the rows.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from eupmu_jax._stack.products import sums_of_products


def _describe(path) -> str:
    return jax.tree_util.keystr(path) or "the tree itself"


def count_objectives(updates: chex.ArrayTree, params: chex.ArrayTree | None = None) -> int:
    """Returns K, the length of the objective axis shared by all leaves of `updates`.

    Args:
      updates: Stacked tree, every leaf of shape `(K, *param.shape)`.
      params: The parameters, if known; then structure and shapes are checked against them.

    Returns:
      K, at least 2.

    Raises:
      ValueError: If a leaf has no objective axis, leaves disagree on K, K is 1, shapes or structures differ from those
        of `params`, or part of the tree is masked out.
    """
    is_masked = lambda node: isinstance(node, optax.MaskedNode)
    if any(map(is_masked, jax.tree.leaves(updates, is_leaf=is_masked))):
        raise ValueError(
            "updates: some leaves are masked, so this transform stands inside optax.masked or optax.partition, where "
            "the other leaves would keep their objective axis and corrupt the parameters they are added to; wrap the "
            "whole chain in eupmu_jax.freeze(chain, frozen) instead"
        )
    leaves = jax.tree_util.tree_leaves_with_path(updates)
    if not leaves:
        raise ValueError("updates: got a tree without leaves; expected the stacked gradients of K >= 2 objectives")
    structures: list[Any] = [jax.tree.structure(tree) for tree in (updates, params)]
    if params is not None and structures[0] != structures[1]:
        raise ValueError(
            f"updates: structure {structures[0]} differs from that of params, {structures[1]}; expected the same tree "
            "with an objective axis in front of every leaf"
        )
    shapes = [jnp.shape(leaf) for _, leaf in leaves]
    first = shapes[0][0] if shapes[0] else 0
    param_shapes = [jnp.shape(p) for p in jax.tree.leaves(params)] if params is not None else [s[1:] for s in shapes]
    for (path, _), shape, param_shape in zip(leaves, shapes, param_shapes, strict=True):
        if not shape or shape != (first, *param_shape):
            expected = f"({first or 'K'}, *{param_shape})" if params is not None else f"({first or 'K'}, ...)"
            raise ValueError(
                f"updates: leaf {_describe(path)} has shape {shape}, expected {expected}: every leaf needs the same "
                "leading objective axis; stacked_value_and_grad makes such trees"
            )
    if first < 2:
        raise ValueError(
            f"updates: got K = {first} objective; surgery needs K >= 2, the forget gradient in row 0 and at least one "
            "retain gradient after it"
        )
    return first


def gram_matrix(updates: chex.ArrayTree) -> chex.Array:
    r"""Inner products of the rows, :math:`G_{ij} = \langle g_i, g_j \rangle` over all leaves.

    Sums are taken in float32 (float64 if any leaf is float64), leaf by leaf on slices of the stack, so the model is
    never copied into a flat vector and, on a mesh, only the K(K+1)/2 sums travel. Norms between 1e-18 and 1e+18 are
    representable; beyond that a float32 Gram matrix under- or overflows.

    Args:
      updates: Stacked tree of shape `(K, ...)` in every leaf.

    Returns:
      Symmetric `(K, K)` array.

    >>> gram_matrix({"w": jnp.array([[-1.0, 1.0], [1.0, 0.0]])}).tolist()
    [[2.0, -1.0], [-1.0, 1.0]]
    """
    leaves = jax.tree.leaves(updates)
    dtype = accumulator_dtype(leaves)
    k = leaves[0].shape[0]
    pairs = tuple((i, j) for i in range(k) for j in range(i, k))
    sums = sum(sums_of_products(leaf, leaf, pairs, dtype) for leaf in leaves)
    entries = dict(zip(pairs, sums, strict=True))
    return jnp.stack([jnp.stack([entries[min(i, j), max(i, j)] for j in range(k)]) for i in range(k)])


def inner_products(updates: chex.ArrayTree, tree: chex.ArrayTree) -> chex.Array:
    """`(K,)` inner products of the rows with a tree of the parameters' shapes, summed as in `gram_matrix`.

    >>> inner_products(jnp.array([[-1.0, 1.0], [1.0, 0.0]]), jnp.array([2.0, 3.0])).tolist()
    [1.0, 2.0]
    """
    leaves = list(zip(jax.tree.leaves(updates), jax.tree.leaves(tree), strict=True))
    dtype = accumulator_dtype(leaves)
    pairs = tuple((k, 0) for k in range(leaves[0][0].shape[0]))
    return sum(sums_of_products(rows, leaf[None], pairs, dtype) for rows, leaf in leaves)


def squared_norm(tree: chex.ArrayTree) -> chex.Array:
    """Sum of squares of all elements, in float32 at least."""
    dtype = accumulator_dtype(tree)
    return sum(jnp.sum(jnp.square(leaf.astype(dtype))) for leaf in jax.tree.leaves(tree))


def combine(updates: chex.ArrayTree, weights: chex.Array, params: chex.ArrayTree | None = None) -> chex.ArrayTree:
    r"""Weighted sum of the rows, :math:`d = \sum_k w_k g_k`, in the dtype of `params` (or of `updates`).

    Args:
      updates: Stacked tree, `(K, *param.shape)` in every leaf.
      weights: `(K,)`.
      params: Only its dtypes are read.

    Returns:
      Tree of the parameters' shapes.
    """
    dtypes = jax.tree.map(lambda leaf: leaf.dtype, updates if params is None else params)

    def combine_leaf(leaf, dtype):
        total = weights[0] * leaf[0]
        for k in range(1, leaf.shape[0]):
            total = total + weights[k] * leaf[k]
        return total.astype(dtype)

    return jax.tree.map(combine_leaf, updates, dtypes)


def accumulator_dtype(tree: chex.ArrayTree) -> jnp.dtype:
    """float64 if any leaf of `tree` is, else float32: the dtype of Gram matrices and multipliers."""
    return jnp.result_type(jnp.float32, *[getattr(leaf, "dtype", jnp.float32) for leaf in jax.tree.leaves(tree)])


def all_finite(tree: chex.ArrayTree) -> chex.Array:
    """Scalar bool: whether every element of every leaf is finite."""
    # A sum vectorises where a conjunction does not, and 0 * inf is NaN, so it cannot overflow either.
    return jnp.stack([jnp.isfinite(jnp.sum(leaf * 0)) for leaf in jax.tree.leaves(tree)]).all()


def check_losses(losses: chex.ArrayTree | None, num_objectives: int) -> chex.Array | None:
    """Returns `losses` as a `(K,)` array, or None if none were given; raises `ValueError` on any other shape."""
    if losses is None:
        return None
    losses = jnp.asarray(losses)
    if losses.shape != (num_objectives,):
        raise ValueError(
            f"losses: got shape {losses.shape}, expected ({num_objectives},): one loss for each objective, the forget "
            "loss first"
        )
    return losses
