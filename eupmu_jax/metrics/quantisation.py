"""Rounding of weights to few bits, after which much that a model unlearned can come back (arXiv 2410.16454)."""

import chex
import jax
import jax.numpy as jnp


def rounded(params: chex.ArrayTree, bits: int) -> chex.ArrayTree:
    r"""The parameters with every matrix as integers of so many bits hold it, in each output channel.

    .. math:: \hat w_{ij} = s_j \operatorname{round}(w_{ij} / s_j), \quad s_j = \max_i |w_{ij}| / (2^{b - 1} - 1)

    Symmetric round-to-nearest, ties to even, with one scale for each output channel j: kernels are `(..., inputs,
    outputs)`, as in Flax, and every matrix of a stack has scales of its own. An embedding `(tokens, width)` has one for
    each of its features. Weights of one dimension (biases, norms) and those that are no floating point numbers stay as
    they are. Shapes and dtypes do not change, and no memory is saved.

    Args:
      params: Any pytree of arrays.
      bits: b, at least 2.

    Returns:
      Such a tree; no weight moves by more than half of its scale.

    Raises:
      ValueError: For fewer than 2 bits.

    >>> rounded({"kernel": jnp.array([[7.0], [3.4], [0.2]]), "bias": jnp.array([0.3])}, 4)["kernel"].tolist()
    [[7.0], [3.0], [0.0]]
    """
    if bits < 2:
        raise ValueError(f"bits: got {bits}, expected at least 2")
    # Symmetric: the lowest integer is not used, so that 0 stays 0 and w and -w are rounded alike.
    largest = 2 ** (bits - 1) - 1

    def of_leaf(weights):
        if weights.ndim < 2 or not jnp.issubdtype(weights.dtype, jnp.floating):
            return weights
        exact = weights.astype(jnp.promote_types(weights.dtype, jnp.float32))
        scales = jnp.max(jnp.abs(exact), axis=-2, keepdims=True) / largest
        levels = jnp.round(exact / jnp.where(scales > 0, scales, 1))
        return (levels * scales).astype(weights.dtype)

    return jax.tree.map(of_leaf, params)
