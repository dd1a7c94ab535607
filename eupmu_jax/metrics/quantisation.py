"""Rounding of weights to few bits, which can bring back much of what a model unlearned (arXiv 2410.16454)."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

_PROJECTIONS = {"query", "key", "value", "q_proj", "k_proj", "v_proj"}
_OUTPUTS = {"out", "o_proj", "attn_vec_einsum"}
# Kernels of google-tunix's Gemma with the heads axis before the inputs.
_STACKED = {"kv_einsum", "qkv_einsum"}


def rounded(params: chex.ArrayTree, bits: int) -> chex.ArrayTree:
    r"""The parameters with every matrix rounded to integers of `bits` bits times a scale for each output channel.

    .. math:: \hat w_{ij} = s_j \operatorname{round}(w_{ij} / s_j), \quad s_j = \max_i |w_{ij}| / (2^{b - 1} - 1)

    This is symmetric round-to-nearest, ties to even, with one scale for each output channel j. Kernels are `(...,
    inputs, outputs)`, as in Flax, and every matrix of a stack has its own scales. For convolutions, with four
    dimensions or more, the inputs are all axes but the last. Attention kernels are recognised by name: `(inputs, heads,
    width)` for `query`, `key`, `value`, `q_proj`, `k_proj` or `v_proj`, `(heads, width, outputs)` for `out`, `o_proj`
    or `attn_vec_einsum`, and `(stack, heads, inputs, width)` for `kv_einsum` or `qkv_einsum`. Under `blocks` without a
    number, as in `models.Decoder`, all are stacked, one for each block. An embedding `(tokens, width)` has a scale for
    each of its features. Weights with one dimension, those named `bias`, and those that are not floating point stay
    unchanged. Shapes and dtypes do not change, and no memory is saved. Low-rank adapters must be merged before
    rounding, with `models.language.merge_lora`: rounded alone they do not represent the model.

    Args:
      params: Any pytree of arrays, or the state of a Flax NNX model.
      bits: b, an int of at least 2.

    Returns:
      A tree like `params`; in float32 no weight moves by more than half of its scale.

    Raises:
      ValueError: If `bits` is not an int or is less than 2.

    >>> rounded({"kernel": jnp.array([[7.0], [3.4], [0.2]]), "bias": jnp.array([0.3])}, 4)["kernel"].tolist()
    [[7.0], [3.0], [0.0]]
    """
    if not isinstance(bits, int | np.integer) or bits < 2:
        raise ValueError(f"bits: got {bits}, expected an int of at least 2")
    # Symmetric: the lowest integer is unused, so that 0 stays 0 and w and -w are rounded alike.
    largest = 2 ** (bits - 1) - 1

    def of_leaf(path, weights):
        if isinstance(weights, nnx.Variable):
            return weights.replace(of_leaf(path, weights[...]))
        names = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in path]
        if weights.ndim - _is_stacked(names) < 2 or "bias" in names or not jnp.issubdtype(weights.dtype, jnp.floating):
            return weights
        exact = weights.astype(jnp.promote_types(weights.dtype, jnp.float32))
        scales = jnp.max(jnp.abs(exact), axis=_inputs_of(names, weights.ndim), keepdims=True) / largest
        levels = jnp.round(exact / jnp.where(scales > 0, scales, 1))
        return (levels * scales).astype(weights.dtype)

    # NNX variables are treated as leaves, or `value` would be part of each path.
    return jax.tree.map_with_path(of_leaf, params, is_leaf=lambda node: isinstance(node, nnx.Variable))


def _is_stacked(names):
    """Whether an array holds the weights of all blocks, as in `models.Decoder`."""
    return "blocks" in names and not any(name.isdigit() for name in names)


def _inputs_of(names, ndim):
    """The axes of a kernel that are summed over."""
    if _is_stacked(names):
        # In these kernels the heads are concatenated.
        return -2
    if ndim == 3 and _PROJECTIONS & set(names):
        return 0
    if ndim == 3 and _OUTPUTS & set(names):
        return (0, 1)
    return -2 if ndim < 4 or _STACKED & set(names) else tuple(range(ndim - 1))
