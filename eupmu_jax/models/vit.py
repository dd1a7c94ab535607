"""Vision transformer for small images."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from eupmu_jax.models.dit import patches_of
from eupmu_jax.models.head import Head
from eupmu_jax.models.transformer import Block


class ViT(nnx.Module):
    """Vision transformer (Dosovitskiy et al. 2021, section 3.1): patches, a class token, pre-norm blocks.

        z_0 = [class; x_1 E; ...; x_N E] + positions,  z_l = Block(z_(l-1)),  logits = LayerNorm(z_L)[0] W + b

    with `N = (image_size / patch_size)^2`. Positions are learned. The default sizes are those of DeiT-Tiny (Touvron et
    al. 2021) with patches for 32x32 images, 5.4 M parameters; ViT-B/16 is `image_size=224`, `patch_size=16`,
    `width=768`, `heads=12`. There is no dropout. With `p = patch_size`, `c = in_channels`, `w = width`, a model has
    `(p^2 c + 1) w + w + (N + 1) w + layers (12 w^2 + 13 w) + 2 w + (w + 1) num_classes` parameters.

    Args:
      num_classes: Number of logits.
      in_channels: Channels of the images.
      image_size: Height and width of the images, a multiple of `patch_size`.
      patch_size: Height and width of a patch.
      width: Size of the residual stream, a multiple of `heads`.
      layers: Number of blocks.
      heads: Number of attention heads per block.
      dtype: Dtype of the computation; promoted from images and parameters by default. Logits are float32 or wider.
      param_dtype: Dtype of the parameters.
      rngs: Source of the keys of the parameters.

    Raises:
      ValueError: If `patch_size` does not divide `image_size`, or `heads` does not divide `width`.

    Cost: attention takes memory `n * heads * (N + 1)^2` per block: 50 tokens for 28x28 images, 65 for 32x32.

    Example:
      >>> make = lambda: ViT(10, in_channels=1, image_size=28, width=12, layers=1, heads=3, rngs=nnx.Rngs(0))
      >>> nnx.eval_shape(lambda: make()(jnp.zeros((2, 28, 28, 1)))).shape
      (2, 10)
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: int = 32,
        patch_size: int = 4,
        width: int = 192,
        layers: int = 12,
        heads: int = 3,
        *,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if image_size % patch_size:
            raise ValueError(f"patch_size must divide image_size, got {patch_size} for {image_size}.")
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.images = (image_size, image_size, in_channels)
        self.patch_size = patch_size
        tokens = (image_size // patch_size) ** 2 + 1
        self.embed = nnx.Linear(patch_size**2 * in_channels, width, **options)
        self.class_token = nnx.Param(jnp.zeros((1, 1, width), param_dtype))
        self.positions = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (1, tokens, width), param_dtype))
        self.blocks = nnx.List(Block(width, heads, causal=False, **options) for _ in range(layers))
        self.norm = nnx.LayerNorm(width, **options)
        self.head = Head(width, num_classes, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images of shape `(n, image_size, image_size, in_channels)` to logits of shape `(n, num_classes)`.

        Raises:
          ValueError: If the images have another shape.
        """
        if x.shape[1:] != self.images:
            raise ValueError(f"ViT was built for images of shape {self.images}, got {x.shape[1:]}.")
        cut = patches_of(x, self.patch_size)
        # A convolution whose stride equals its kernel size, as one matmul over the patches, row by row.
        y = self.embed(cut.reshape(len(x), -1, cut.shape[-1]))
        class_token = jnp.broadcast_to(self.class_token[...].astype(y.dtype), (len(y), 1, y.shape[-1]))
        y = jnp.concatenate([class_token, y], axis=1) + self.positions[...].astype(y.dtype)
        for block in self.blocks:
            y = block(y)
        return self.head(self.norm(y[:, 0]))
