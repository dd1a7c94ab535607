"""Lengths and angles of the rows, and the spectrum of a matrix of them."""

from collections.abc import Callable

import chex
import jax.numpy as jnp

# Eigenvalues below this many units of rounding, relative to the largest, count as zero: as in `nnls`.
_ROUNDING = 64


def norms_and_cosines(gram: chex.Array) -> tuple[chex.Array, chex.Array]:
    r"""Lengths :math:`n_i` `(K,)` of the rows and the Gram matrix `(K, K)` of the unit rows; a zero row stays zero.

    >>> norms, cosines = norms_and_cosines(jnp.array([[4.0, -1.0], [-1.0, 1.0]]))
    >>> norms.tolist(), cosines.tolist()
    ([2.0, 1.0], [[1.0, -0.5], [-0.5, 1.0]])
    """
    norms = jnp.sqrt(jnp.diagonal(gram))
    present = norms > 0
    lengths = jnp.where(present, norms, 1)
    own = jnp.eye(len(gram), dtype=bool)
    return norms, jnp.where(own, present.astype(gram.dtype), gram / lengths[:, None] / lengths[None])


def divide_by_norms(weights: chex.Array, norms: chex.Array) -> chex.Array:
    """Weights of the rows from weights of the unit rows; a zero row gets 0.

    >>> divide_by_norms(jnp.ones(2), jnp.array([2.0, 0.0])).tolist()
    [0.5, 0.0]
    """
    return jnp.where(norms > 0, weights / jnp.where(norms > 0, norms, 1), 0)


def apply_to_ones(matrix: chex.Array, function: Callable[[chex.Array, chex.Array], chex.Array]) -> chex.Array:
    r"""`(K,)` vector :math:`\sum_r f(\lambda_r) v_r v_r^\top 1` over the eigenpairs that are not zero up to rounding.

    Args:
      matrix: Symmetric, positive semi-definite, `(K, K)`.
      function: `(values, rank) -> f`, from the eigenvalues in ascending order, of which the last `rank` count; what it
        returns for the others is not used. `1 / values` makes it the pseudo-inverse.

    >>> apply_to_ones(jnp.diag(jnp.array([2.0, 4.0, 0.0])), lambda values, rank: 1 / values).tolist()
    [0.5, 0.25, 0.0]
    """
    values, vectors = jnp.linalg.eigh(matrix)
    present = values > _ROUNDING * jnp.finfo(values.dtype).eps * values[-1]
    # Sums, since matrix units would round the products of a float32 matmul.
    sums, rounding = vectors.sum(axis=0), _ROUNDING * jnp.finfo(values.dtype).eps
    # A small eigenvalue would amplify what rounding leaves of a sum that is 0.
    sums = jnp.where(jnp.abs(sums) > rounding * jnp.abs(vectors).sum(axis=0), sums, 0)
    factors = jnp.where(present, function(jnp.where(present, values, 1), present.sum()), 0) * sums
    return jnp.sum(vectors * factors[None], axis=1)
