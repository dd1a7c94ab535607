"""Rounding of weights to 4 bits, after which much that a model unlearned can come back (arXiv 2410.16454)."""

import chex
import jax
import jax.numpy as jnp

# Symmetric: -8 is not used, so that 0 stays 0 and w and -w are rounded alike.
LARGEST = 7


def rounded_to_int4(params: chex.ArrayTree) -> chex.ArrayTree:
    r"""The parameters with every matrix rounded to 15 levels in each output channel.

    .. math:: \hat w_{ij} = s_j \operatorname{round}(w_{ij} / s_j), \quad s_j = \max_i |w_{ij}| / 7

    Symmetric round-to-nearest, ties to even, with one scale for each output channel j: kernels are `(..., inputs,
    outputs)`, as in Flax, and every matrix of a stack has scales of its own. An embedding `(tokens, width)` has one for
    each of its features. Weights of one dimension (biases, norms) and those that are no floating point numbers stay as
    they are. It simulates storage in 4 bits: shapes and dtypes do not change, and nothing is saved.

    Args:
      params: Any pytree of arrays.

    Returns:
      Such a tree; no weight moves by more than half of its scale.

    >>> rounded_to_int4({"kernel": jnp.array([[7.0], [3.4], [0.2]]), "bias": jnp.array([0.3])})["kernel"].tolist()
    [[7.0], [3.0], [0.0]]
    """
    return jax.tree.map(_rounded, params)


def _rounded(weights):
    if weights.ndim < 2 or not jnp.issubdtype(weights.dtype, jnp.floating):
        return weights
    exact = weights.astype(jnp.promote_types(weights.dtype, jnp.float32))
    scales = jnp.max(jnp.abs(exact), axis=-2, keepdims=True) / LARGEST
    levels = jnp.round(exact / jnp.where(scales > 0, scales, 1))
    return (levels * scales).astype(weights.dtype)
