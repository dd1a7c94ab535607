"""Multilayer perceptron."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from eupmu_jax.models.head import Head


class MLP(nnx.Module):
    """Multilayer perceptron with relu between its layers; flattens its input.

    Args:
      features: Sizes of the flattened input, of every hidden layer and of the logits.
      rngs: Source of the keys of the parameters.
      dtype: Dtype of the computation; promoted from inputs and parameters by default. Logits are float32 or wider.
      param_dtype: Dtype of the parameters.

    Raises:
      ValueError: If `features` has fewer than two entries.

    Example:
      >>> model = MLP((784, 1024, 10), rngs=nnx.Rngs(0))
      >>> model(jnp.zeros((8, 28, 28, 1))).shape
      (8, 10)
    """

    def __init__(
        self,
        features: Sequence[int],
        rngs: nnx.Rngs,
        *,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
    ):
        if len(features) < 2:
            raise ValueError(f"features needs an input and an output size, got {tuple(features)}.")
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        options["kernel_init"] = nnx.initializers.he_normal()
        self.layers = nnx.List(
            nnx.Linear(fan_in, fan_out, **options) for fan_in, fan_out in itertools.pairwise(features[:-1])
        )
        self.layers.append(Head(features[-2], features[-1], **options))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps inputs of shape `(n, ...)` to logits of shape `(n, features[-1])`."""
        x = jnp.reshape(x, (x.shape[0], -1))
        for layer in self.layers[:-1]:
            x = nnx.relu(layer(x))
        return self.layers[-1](x)
