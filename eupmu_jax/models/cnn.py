"""Small convolutional classifier without normalisation."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from eupmu_jax.models.convolution import Conv
from eupmu_jax.models.head import Head


class SmallCNN(nnx.Module):
    """Stride-2 3x3 convolutions with relu, then a hidden dense layer and the logits.

    Args:
      num_classes: Number of logits.
      channels: Output channels of every convolution.
      in_channels: Channels of the images.
      image_size: Height and width of the images.
      hidden: Width of the dense layer before the logits.
      dtype: Dtype of the computation; promoted from images and parameters by default. Logits are float32 or wider.
      param_dtype: Dtype of the parameters.
      rngs: Source of the keys of the parameters.

    Example:
      >>> nnx.eval_shape(lambda: SmallCNN(10, image_size=8, rngs=nnx.Rngs(0))(jnp.zeros((2, 8, 8, 1)))).shape
      (2, 10)
    """

    def __init__(
        self,
        num_classes: int,
        channels: Sequence[int] = (32, 64, 128),
        in_channels: int = 1,
        image_size: int = 28,
        hidden: int = 128,
        *,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        init = nnx.initializers.he_normal()
        self.convs: nnx.List[Conv] = nnx.List()
        for out_channels in channels:
            self.convs.append(Conv(in_channels, out_channels, (3, 3), 2, kernel_init=init, **options))
            in_channels, image_size = out_channels, -(-image_size // 2)
        self.hidden = nnx.Linear(image_size**2 * in_channels, hidden, kernel_init=init, **options)
        self.head = Head(hidden, num_classes, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images of shape `(n, image_size, image_size, in_channels)` to logits of shape `(n, num_classes)`."""
        for conv in self.convs:
            x = nnx.relu(conv(x))
        x = nnx.relu(self.hidden(jnp.reshape(x, (x.shape[0], -1))))
        return self.head(x)
