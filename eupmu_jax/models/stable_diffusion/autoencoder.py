"""The autoencoder of Stable Diffusion 1.x: from images to latent images of an eighth of the size, and back."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from eupmu_jax.models.stable_diffusion._layers import Attention, ResidualBlock, conv, doubled, norm
from eupmu_jax.tasks.examples import check_images

# With the published weights, latent images multiplied by it have about unit variance.
SCALE = 0.18215
EPSILON = 1e-6
# Bounds of the logarithm of the variance.
BOUNDS = (-30.0, 20.0)
# Decoded or resampled images go slightly beyond 1; pixels of 0 to 255 go far beyond this limit.
FURTHEST = 2.0


class AutoencoderConfig(NamedTuple):
    """Sizes of an `Autoencoder`; the default is that of Stable Diffusion 1.x.

    Attributes:
      channels: Channels of the images.
      latent_channels: Channels of the latent images.
      widths: Channels of each level, multiples of `groups`; each level after the first halves height and width.
      blocks: Blocks per level of the encoder; the decoder has one more.
      groups: Number of groups in group normalisation.
    """

    channels: int = 3
    latent_channels: int = 4
    widths: tuple[int, ...] = (128, 256, 512, 512)
    blocks: int = 2
    groups: int = 32


# TINY is for tests.
PUBLISHED = AutoencoderConfig()
TINY = AutoencoderConfig(latent_channels=2, widths=(4, 8), blocks=1, groups=2)


class _Level(nnx.Module):
    """Residual blocks of one width, and a convolution if sizes change."""

    def __init__(self, inputs: list[int], channels: int, groups: int, *, stride: int | None, rngs: nnx.Rngs):
        self.resnets = nnx.List(ResidualBlock(n, channels, groups, EPSILON, rngs=rngs) for n in inputs)
        padding = "VALID" if stride == 2 else 1
        self.resize = None if stride is None else conv(channels, channels, strides=stride, padding=padding, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.resnets:
            x = block(x)
        return x


class _SelfAttention(nnx.Module):
    """Single-head self-attention over all positions of an image, with a shortcut."""

    def __init__(self, channels: int, groups: int, *, rngs: nnx.Rngs):
        self.group_norm = norm(channels, num_groups=groups, epsilon=EPSILON, rngs=rngs)
        self.attention = Attention(channels, 1, bias=True, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.attention(self.group_norm(x).reshape(len(x), -1, x.shape[-1])).reshape(x.shape)


class _MidBlock(nnx.Module):
    """A residual block, attention, and a residual block."""

    def __init__(self, channels: int, groups: int, *, rngs: nnx.Rngs):
        self.resnets = nnx.List(ResidualBlock(channels, channels, groups, EPSILON, rngs=rngs) for _ in range(2))
        self.attentions = nnx.List([_SelfAttention(channels, groups, rngs=rngs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class _Encoder(nnx.Module):
    """Maps images to features, from which the moments of the latent images are computed."""

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs):
        widths, groups = config.widths, config.groups
        self.conv_in = conv(config.channels, widths[0], rngs=rngs)
        self.down_blocks: nnx.List[_Level] = nnx.List()
        for i, (before, width) in enumerate(zip((widths[0], *widths), widths, strict=False)):
            inputs, stride = [before, *[width] * (config.blocks - 1)], 2 if i < len(widths) - 1 else None
            self.down_blocks.append(_Level(inputs, width, groups, stride=stride, rngs=rngs))
        self.mid_block = _MidBlock(widths[-1], groups, rngs=rngs)
        self.conv_norm_out = norm(widths[-1], num_groups=groups, epsilon=EPSILON, rngs=rngs)
        self.conv_out = conv(widths[-1], 2 * config.latent_channels, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
            if level.resize is not None:
                # Zeros only after the image, unlike in the U-Net.
                x = level.resize(jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0))))
        return self.conv_out(nnx.silu(self.conv_norm_out(self.mid_block(x))))


class _Decoder(nnx.Module):
    """Maps latent images to images."""

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs):
        widths, groups = config.widths[::-1], config.groups
        self.conv_in = conv(config.latent_channels, widths[0], rngs=rngs)
        self.mid_block = _MidBlock(widths[0], groups, rngs=rngs)
        self.up_blocks: nnx.List[_Level] = nnx.List()
        for i, (before, width) in enumerate(zip((widths[0], *widths), widths, strict=False)):
            inputs, stride = [before, *[width] * config.blocks], 1 if i < len(widths) - 1 else None
            self.up_blocks.append(_Level(inputs, width, groups, stride=stride, rngs=rngs))
        self.conv_norm_out = norm(widths[-1], num_groups=groups, epsilon=EPSILON, rngs=rngs)
        self.conv_out = conv(widths[-1], config.channels, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.mid_block(self.conv_in(x))
        for level in self.up_blocks:
            x = level(x)
            if level.resize is not None:
                x = level.resize(doubled(x))
        return self.conv_out(nnx.silu(self.conv_norm_out(x)))


class Autoencoder(nnx.Module):
    """The variational autoencoder of latent diffusion (Rombach et al. 2022, arXiv 2112.10752, section 3.1).

    Modules are named as in the published weights. The default configuration has 83,653,863 parameters.

    Args:
      config: Sizes.
      rngs: Source of the keys of the parameters.

    Raises:
      ValueError: If a width is not a multiple of the groups.

    Example:
      >>> images = jnp.zeros((2, 8, 8, 3))
      >>> mean, logvar = nnx.eval_shape(lambda: Autoencoder(TINY, rngs=nnx.Rngs(0)).encode(images))
      >>> mean.shape, logvar.shape
      ((2, 4, 4, 2), (2, 4, 4, 2))
    """

    def __init__(self, config: AutoencoderConfig = PUBLISHED, *, rngs: nnx.Rngs):
        if any(width % config.groups for width in config.widths):
            raise ValueError(f"config: got widths {config.widths}, expected multiples of groups, {config.groups}")
        self.encoder = _Encoder(config, rngs=rngs)
        self.decoder = _Decoder(config, rngs=rngs)
        self.quant_conv = nnx.Linear(2 * config.latent_channels, 2 * config.latent_channels, rngs=rngs)
        self.post_quant_conv = nnx.Linear(config.latent_channels, config.latent_channels, rngs=rngs)

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The normal distribution of the latent image, not yet scaled; `latents` draws from it.

        Args:
          images: In [-1, 1], `(n, height, width, channels)`.

        Returns:
          `(mean, logvar)`, each `(n, height / 8, width / 8, latent_channels)` for four levels; the logarithm of the
          variance is in [-30, 20].

        Raises:
          ValueError: If height or width cannot be halved often enough, or for images outside [-2, 2] or not finite;
            traced images cannot be checked.
        """
        unit = 2 ** (len(self.encoder.down_blocks) - 1)
        if images.shape[1] % unit or images.shape[2] % unit:
            raise ValueError(f"images: got shape {images.shape}, expected height and width to be multiples of {unit}")
        check_images("images", images, FURTHEST)
        mean, logvar = jnp.split(self.quant_conv(self.encoder(images)), 2, axis=-1)
        return mean, jnp.clip(logvar, *BOUNDS)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Decodes unscaled latent images: pass `z / SCALE` for z from the U-Net.

        Args:
          latents: `(n, height, width, latent_channels)`.

        Returns:
          `(n, 8 height, 8 width, channels)` for four levels, roughly in [-1, 1] but not clipped to it.
        """
        return self.decoder(self.post_quant_conv(latents))


def latents(mean: jax.Array, logvar: jax.Array, key: chex.PRNGKey) -> jax.Array:
    r"""Draws the U-Net's training data :math:`z = 0.18215\, (\mu + e^{\ell / 2} \epsilon)` from `Autoencoder.encode`.

    >>> latents(jnp.ones((1, 1)), jnp.full((1, 1), -30.0), jax.random.key(0)).round(4).tolist()
    [[0.182...]]
    """
    return SCALE * (mean + jnp.exp(logvar / 2) * jax.random.normal(key, mean.shape, mean.dtype))
