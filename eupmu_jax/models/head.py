"""The layer that computes logits."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


class Head(nnx.Linear):
    """`flax.nnx.Linear` that computes in `dtype` or float32, whichever is wider: losses need logits of that precision.

    Args:
      in_features: Size of the features.
      num_classes: Number of logits.
      dtype: Dtype of the computation of the features; by default the promoted dtype of features and parameters.
      rngs: Source of the keys of the parameters.
      **kwargs: Options of `flax.nnx.Linear`.

    Example:
      >>> Head(4, 3, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))(jnp.zeros((2, 4), jnp.bfloat16)).dtype
      dtype('float32')
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        dtype: jax.typing.DTypeLike | None = None,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        dtype = None if dtype is None else jnp.promote_types(dtype, jnp.float32)
        super().__init__(in_features, num_classes, dtype=dtype, rngs=rngs, **kwargs)
