"""Layers that the U-Net and the autoencoder share."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from eupmu_jax.models.convolution import Conv

conv = functools.partial(Conv, kernel_size=(3, 3), padding=1)
# The variance of centred values, so that a large mean does not cause rounding errors.
norm = functools.partial(nnx.GroupNorm, use_fast_variance=False)


class ResidualBlock(nnx.Module):
    """Two normalised 3x3 convolutions with a shortcut, with time features added between them.

    Args:
      in_channels: Channels of the input.
      channels: Channels of the output; if they differ, the shortcut is a 1x1 convolution.
      groups: Number of groups in group normalisation.
      epsilon: Epsilon of group normalisation.
      time: Width of the time features; None for none.
      rngs: Source of the keys of the parameters.
    """

    def __init__(
        self, in_channels: int, channels: int, groups: int, epsilon: float, time: int | None = None, *, rngs: nnx.Rngs
    ):
        self.norm1 = norm(in_channels, num_groups=groups, epsilon=epsilon, rngs=rngs)
        self.conv1 = conv(in_channels, channels, rngs=rngs)
        if time is not None:
            self.time_emb_proj = nnx.Linear(time, channels, rngs=rngs)
        self.norm2 = norm(channels, num_groups=groups, epsilon=epsilon, rngs=rngs)
        self.conv2 = conv(channels, channels, rngs=rngs)
        self.projects = in_channels != channels
        if self.projects:
            self.conv_shortcut = nnx.Linear(in_channels, channels, rngs=rngs)

    def __call__(self, x: jax.Array, time: jax.Array | None = None) -> jax.Array:
        """Maps `(n, height, width, in_channels)` to `(n, height, width, channels)`, at times `(n, time)`."""
        y = self.conv1(nnx.silu(self.norm1(x)))
        if time is not None:
            y = y + self.time_emb_proj(nnx.silu(time))[:, None, None]
        y = self.conv2(nnx.silu(self.norm2(y)))
        return (self.conv_shortcut(x) if self.projects else x) + y


class Attention(nnx.Module):
    """Attention of image positions to each other or to tokens.

    Args:
      width: Width of queries and of the output, a multiple of `heads`.
      heads: Number of attention heads.
      context: Width of the input of keys and values; None means the input itself.
      bias: Whether queries, keys and values have a bias; the output always has one.
      rngs: Source of the keys of the parameters.
    """

    def __init__(self, width: int, heads: int, context: int | None = None, *, bias: bool = False, rngs: nnx.Rngs):
        self.heads = heads
        self.to_q = nnx.Linear(width, width, use_bias=bias, rngs=rngs)
        self.to_k = nnx.Linear(context or width, width, use_bias=bias, rngs=rngs)
        self.to_v = nnx.Linear(context or width, width, use_bias=bias, rngs=rngs)
        self.to_out = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, x: jax.Array, context: jax.Array | None = None) -> jax.Array:
        """Maps `(n, places, width)` to the same shape, from `(n, tokens, context)` or from itself."""
        source = x if context is None else context
        parts = self.to_q(x), self.to_k(source), self.to_v(source)
        # Image and text may differ in dtype, which JAX's attention refuses.
        dtype = jnp.result_type(*parts)
        query, key, value = (part.astype(dtype).reshape(*part.shape[:-1], self.heads, -1) for part in parts)
        return self.to_out(jax.nn.dot_product_attention(query, key, value).reshape(x.shape))


def doubled(x: jax.Array) -> jax.Array:
    """An image of twice the height and width, with each pixel repeated four times."""
    return x.repeat(2, axis=1).repeat(2, axis=2)
