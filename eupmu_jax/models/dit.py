"""A diffusion transformer for small images."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from eupmu_jax._stack.checks import check_int
from eupmu_jax.tasks.examples import check_labels


def time_features(t: jax.Array, width: int) -> jax.Array:
    """Sines and cosines of times `(n,)`, with periods from 2 pi to nearly 20,000 pi: `(n, width)` for an even width.

    >>> time_features(jnp.array([0, 5]), 4)[0].tolist()
    [1.0, 1.0, 0.0, 0.0]
    """
    rates = jnp.exp(-math.log(10_000) * jnp.arange(width // 2) / (width // 2))
    angles = t[:, None].astype(jnp.float32) * rates
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def patches_of(images: jax.Array, size: int) -> jax.Array:
    """Square patches of images `(n, height, width, channels)`: `(n, height / size, width / size, numbers)`.

    >>> patches_of(jnp.arange(16).reshape(1, 4, 4, 1), 2)[0, 0].tolist()
    [[0, 1, 4, 5], [2, 3, 6, 7]]
    """
    n, height, width, channels = images.shape
    cut = images.reshape(n, height // size, size, width // size, size, channels).transpose(0, 1, 3, 2, 4, 5)
    return cut.reshape(n, height // size, width // size, size * size * channels)


def images_of(patches: jax.Array, size: int) -> jax.Array:
    """The images whose patches `patches_of` returns; its inverse.

    >>> images = jnp.arange(48).reshape(2, 4, 6, 1)
    >>> bool(jnp.all(images_of(patches_of(images, 2), 2) == images))
    True
    """
    n, rows, columns, numbers = patches.shape
    channels = numbers // size**2
    cut = patches.reshape(n, rows, columns, size, size, channels).transpose(0, 1, 3, 2, 4, 5)
    return cut.reshape(n, rows * size, columns * size, channels)


class Conditions(nnx.Embed):
    """A row for each condition and one for no condition; refuses labels without a row, for which JAX returns NaN.

    >>> Conditions(3, 2, rngs=nnx.Rngs(0))(jnp.array([3]))
    Traceback (most recent call last):
    ValueError: labels: got 3, expected ints from 0 to 2
    """

    def __call__(self, inputs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """Maps labels `(n,)` to `(n, features)`; traced labels cannot be checked."""
        check_labels(inputs, self.num_embeddings)
        return super().__call__(inputs, *args, **kwargs)


class DiTBlock(nnx.Module):
    """Pre-norm attention and MLP whose norms are shifted, scaled and gated by a condition (adaLN-Zero).

    At first the gates are zero, and the block is the identity.

    Args:
      width: Size of the residual stream and of the condition, a multiple of `heads`.
      heads: Number of attention heads.
      rngs: Source of the keys of the parameters.

    Example:
      >>> block = DiTBlock(8, 2, rngs=nnx.Rngs(0))
      >>> x = jnp.ones((1, 4, 8))
      >>> bool(jnp.all(block(x, jnp.ones((1, 8))) == x))
      True
    """

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        zeros = nnx.initializers.zeros
        self.modulation = nnx.Linear(width, 6 * width, kernel_init=zeros, rngs=rngs)
        self.attention_norm = nnx.LayerNorm(width, use_bias=False, use_scale=False, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.mlp_norm = nnx.LayerNorm(width, use_bias=False, use_scale=False, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array, condition: jax.Array) -> jax.Array:
        """Maps `(n, patches, width)` to the same shape, under a condition `(n, width)`."""
        parts = jnp.split(self.modulation(nnx.silu(condition))[:, None], 6, axis=-1)
        shifts, scales, gates = parts[:2], parts[2:4], parts[4:]
        x = x + gates[0] * self.attention(self.attention_norm(x) * (1 + scales[0]) + shifts[0])
        hidden = self.mlp_norm(x) * (1 + scales[1]) + shifts[1]
        # Flat, as XLA multiplies two-dimensional matrices faster on a CPU.
        flat = self.down(nnx.gelu(self.up(hidden.reshape(-1, hidden.shape[-1]))))
        return x + gates[1] * flat.reshape(x.shape)


class DiT(nnx.Module):
    """Diffusion transformer with classes as conditions (Peebles & Xie 2023, arXiv 2212.09748).

    It has patches, learned positions, blocks with adaLN-Zero, and a last layer initialised to zero, so that the first
    prediction is 0.

    Args:
      num_conditions: Number of classes; one more label stands for no class.
      in_channels: Channels of the images.
      image_size: Height and width, a multiple of `patch_size`.
      patch_size: Height and width of a patch.
      width: Size of the residual stream, a multiple of `heads`, and even.
      layers: Number of blocks.
      heads: Number of attention heads.
      rngs: Source of the keys of the parameters.

    Raises:
      ValueError: For fewer than 0 layers, another number below 1, or if `patch_size` does not divide `image_size`, or
        `heads` or 2 the width.

    Example:
      >>> make = lambda: DiT(10, in_channels=1, image_size=8, patch_size=2, width=8, heads=2, rngs=nnx.Rngs(0))
      >>> nnx.eval_shape(lambda: make()(jnp.ones((3, 8, 8, 1)), jnp.array([0, 5, 9]), jnp.array([0, 1, 10]))).shape
      (3, 8, 8, 1)
    """

    def __init__(
        self,
        num_conditions: int,
        in_channels: int = 1,
        image_size: int = 8,
        patch_size: int = 2,
        width: int = 64,
        layers: int = 4,
        heads: int = 4,
        *,
        rngs: nnx.Rngs,
    ):
        counts = {"num_conditions": num_conditions, "in_channels": in_channels, "image_size": image_size}
        for name, value in (counts | {"heads": heads}).items():
            check_int(name, value, 1, static=True)
        check_int("layers", layers, 0, static=True)
        if patch_size < 1 or image_size % patch_size:
            raise ValueError(f"patch_size: got {patch_size}, expected a divisor of the image size {image_size}")
        if width < 1 or width % heads or width % 2:
            raise ValueError(f"width: got {width}, expected an even multiple of heads, {heads}")
        self.image_size, self.in_channels, self.patch_size, self.width = image_size, in_channels, patch_size, width
        numbers, small = patch_size**2 * in_channels, nnx.initializers.normal(0.02)
        zeros = nnx.initializers.zeros
        self.patches = nnx.Linear(numbers, width, rngs=rngs)
        self.positions = nnx.Param(small(rngs.params(), ((image_size // patch_size) ** 2, width)))
        self.times = nnx.Linear(width, width, rngs=rngs)
        self.conditions = Conditions(num_conditions + 1, width, embedding_init=small, rngs=rngs)
        self.blocks = nnx.List(DiTBlock(width, heads, rngs=rngs) for _ in range(layers))
        self.modulation = nnx.Linear(width, 2 * width, kernel_init=zeros, rngs=rngs)
        self.norm = nnx.LayerNorm(width, use_bias=False, use_scale=False, rngs=rngs)
        self.out = nnx.Linear(width, numbers, kernel_init=zeros, rngs=rngs)

    def __call__(self, x: jax.Array, t: jax.Array, labels: jax.Array) -> jax.Array:
        """Predicts for noised images.

        Args:
          x: `(n, image_size, image_size, channels)`.
          t: Times, ints `(n,)`.
          labels: Ints `(n,)`; `num_conditions` itself stands for no condition.

        Returns:
          The predictions, shaped like `x`.

        Raises:
          ValueError: For images of another shape than the model was built for, or labels that are not conditions.
        """
        images = self.image_size, self.image_size, self.in_channels
        if x.shape[1:] != images:
            raise ValueError(f"x: got shape {x.shape}, expected (n, {', '.join(map(str, images))})")
        cut = patches_of(x, self.patch_size)
        h = self.patches(cut.reshape(len(x), -1, cut.shape[-1])) + self.positions[...]
        condition = self.times(time_features(t, self.width).astype(x.dtype)) + self.conditions(labels).astype(x.dtype)
        for block in self.blocks:
            h = block(h, condition)
        shift, scale = jnp.split(self.modulation(nnx.silu(condition))[:, None], 2, axis=-1)
        return images_of(self.out(self.norm(h) * (1 + scale) + shift).reshape(cut.shape), self.patch_size)
