"""Algebra of stacked trees: pytrees whose leaves carry one gradient for each objective along axis 0.

Row 0 is the forget objective, rows 1 to K-1 are the retain constraints. Everything a stacked transform needs from the
model is here: the K x K Gram matrix and a weighted sum of the rows.
"""

import chex
import jax
import jax.numpy as jnp

from eupmu_jax._stack.checks import check_real
from eupmu_jax._stack.products import sums_of_products


def gram_matrix(updates: chex.ArrayTree) -> chex.Array:
    r"""Inner products of the rows, :math:`G_{ij} = \langle g_i, g_j \rangle` over all leaves.

    Sums are taken in float32 (float64 if any leaf is float64), leaf by leaf on slices of the stack, so the model is
    never copied into a flat vector and, on a mesh, only the K(K+1)/2 sums are communicated. A norm above 1e+18
    overflows a float32 Gram matrix, and the squares of elements below 1e-19 are 0 in it.

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
    dtypes = jax.tree.map(jnp.result_type, updates if params is None else params)

    def combine_leaf(leaf, dtype):
        exact = jnp.promote_types(weights.dtype, leaf.dtype)
        term = lambda k: weights[k].astype(exact) * leaf[k].astype(exact)
        total = term(0)
        for k in range(1, leaf.shape[0]):
            total = total + term(k)
        return total.astype(dtype)

    return jax.tree.map(combine_leaf, updates, dtypes)


def accumulator_dtype(tree: chex.ArrayTree) -> jnp.dtype:
    """float64 if any leaf of `tree` is, else float32: the dtype of Gram matrices and multipliers.

    Raises:
      ValueError: For a complex leaf.
    """
    check_real("params", tree)
    # Dtypes alone would make JAX warn of float64 in NumPy arrays, which it takes for float32 where that is disabled.
    dtypes = [jax.dtypes.canonicalize_dtype(getattr(leaf, "dtype", jnp.float32)) for leaf in jax.tree.leaves(tree)]
    return jnp.result_type(jnp.float32, *dtypes)


def all_finite(tree: chex.ArrayTree) -> chex.Array:
    """Scalar bool: whether every element of every leaf is finite."""
    # A sum vectorises and a conjunction does not; as 0 * inf is NaN, it cannot overflow either.
    return jnp.array([jnp.isfinite(jnp.sum(leaf * 0)) for leaf in jax.tree.leaves(tree)], bool).all()


# For use outside of `jit`, where each of these operations would be a program of its own.
is_finite = jax.jit(all_finite)
