"""The U-Net of Stable Diffusion 1.x: predicts the noise of latent images, given embedded text."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from eupmu_jax.models.dit import time_features
from eupmu_jax.models.stable_diffusion._layers import Attention, ResidualBlock, conv, doubled, norm

# Epsilon of residual blocks and the last layer; norms before attention have their own.
EPSILON, ATTENTION_EPSILON = 1e-5, 1e-6
LAYER_EPSILON = 1e-5


class UNetConfig(NamedTuple):
    """Sizes of a `ConditionalUNet`; the default is Stable Diffusion 1.x.

    Attributes:
      channels: Channels of the latent images and of the prediction.
      widths: Channels of each level, multiples of `groups` and of `heads`; each level after the first halves height and
        width, and all but the last have attention.
      blocks: Blocks per level in the downward path; the upward path has one more.
      heads: Number of attention heads.
      context: Width of the embedded text.
      groups: Number of groups in group normalisation.
    """

    channels: int = 4
    widths: tuple[int, ...] = (320, 640, 1280, 1280)
    blocks: int = 2
    heads: int = 8
    context: int = 768
    groups: int = 32


# TINY is for tests.
PUBLISHED = UNetConfig()
TINY = UNetConfig(widths=(8, 16), blocks=1, heads=2, context=12, groups=4)


class _FeedForward(nnx.Module):
    """Two layers, the first of which is gated (GEGLU), with the exact GELU."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.up = nnx.Linear(width, 8 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden, gate = jnp.split(self.up(x), 2, axis=-1)
        return self.down(hidden * nnx.gelu(gate, approximate=False))


class TransformerBlock(nnx.Module):
    """Self-attention (`attn1`), attention to the text (`attn2`), and an MLP, each added to its input.

    Args:
      width: Size of the residual stream, a multiple of `heads`.
      heads: Number of attention heads.
      context: Width of the embedded text.
      rngs: Source of the keys of the parameters.

    Example:
      >>> x, context = jnp.ones((1, 6, 8)), jnp.ones((1, 3, 5))
      >>> nnx.eval_shape(lambda: TransformerBlock(8, 2, 5, rngs=nnx.Rngs(0))(x, context)).shape
      (1, 6, 8)
    """

    def __init__(self, width: int, heads: int, context: int, *, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(width, epsilon=LAYER_EPSILON, rngs=rngs)
        self.attn1 = Attention(width, heads, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, epsilon=LAYER_EPSILON, rngs=rngs)
        self.attn2 = Attention(width, heads, context, rngs=rngs)
        self.norm3 = nnx.LayerNorm(width, epsilon=LAYER_EPSILON, rngs=rngs)
        self.ff = _FeedForward(width, rngs=rngs)

    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        """Maps `(n, places, width)` to the same shape, given the text `(n, tokens, context)`."""
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class _SpatialTransformer(nnx.Module):
    """A `TransformerBlock` over the positions of an image, between 1x1 convolutions, with a shortcut."""

    def __init__(self, channels: int, config: UNetConfig, *, rngs: nnx.Rngs):
        self.norm = norm(channels, num_groups=config.groups, epsilon=ATTENTION_EPSILON, rngs=rngs)
        self.proj_in = nnx.Linear(channels, channels, rngs=rngs)
        self.block = TransformerBlock(channels, config.heads, config.context, rngs=rngs)
        self.proj_out = nnx.Linear(channels, channels, rngs=rngs)

    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        y = self.proj_in(self.norm(x).reshape(len(x), -1, x.shape[-1]))
        return x + self.proj_out(self.block(y, context)).reshape(x.shape)


class _Level(nnx.Module):
    """Residual blocks, each followed by attention to the text if it `attends`, and a convolution if sizes change."""

    def __init__(
        self, inputs: list[int], width: int, config: UNetConfig, *, attends: bool, stride: int | None, rngs: nnx.Rngs
    ):
        time = 4 * config.widths[0]
        self.resnets = nnx.List(ResidualBlock(n, width, config.groups, EPSILON, time, rngs=rngs) for n in inputs)
        self.attentions = nnx.List(_SpatialTransformer(width, config, rngs=rngs) for _ in inputs if attends)
        self.resize = None if stride is None else conv(width, width, strides=stride, rngs=rngs)

    def block(self, i: int, x: jax.Array, time: jax.Array, context: jax.Array) -> jax.Array:
        x = self.resnets[i](x, time)
        return self.attentions[i](x, context) if self.attentions else x


class _MidBlock(nnx.Module):
    """A residual block, attention to the text, and a residual block."""

    def __init__(self, width: int, config: UNetConfig, *, rngs: nnx.Rngs):
        time = 4 * config.widths[0]
        self.resnets = nnx.List(ResidualBlock(width, width, config.groups, EPSILON, time, rngs=rngs) for _ in range(2))
        self.attentions = nnx.List([_SpatialTransformer(width, config, rngs=rngs)])

    def __call__(self, x: jax.Array, time: jax.Array, context: jax.Array) -> jax.Array:
        return self.resnets[1](self.attentions[0](self.resnets[0](x, time), context), time)


class _Times(nnx.Module):
    """Two layers that map time features to the time embedding."""

    def __init__(self, features: int, width: int, *, rngs: nnx.Rngs):
        self.linear_1 = nnx.Linear(features, width, rngs=rngs)
        self.linear_2 = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear_2(nnx.silu(self.linear_1(x)))


class ConditionalUNet(nnx.Module):
    """The denoiser of latent diffusion with text (Rombach et al. 2022, arXiv 2112.10752), as in Stable Diffusion 1.x.

    Modules are named as in the published weights: `attn2` is attention to the text, which only its `to_k` and `to_v`
    read. The default configuration has 859,520,964 parameters. Computation uses the promoted dtype of parameters and
    inputs: cast parameters, latent images and embeddings to bfloat16 for half the memory. `tasks.diffusion` and
    `models.sampling.sample` pass latent images in float32, so cast these in the function that they call.

    Args:
      config: Sizes.
      rngs: Source of the keys of the parameters.

    Raises:
      ValueError: If a width is not a multiple of both the groups and the heads.

    Example:
      >>> model = nnx.eval_shape(lambda: ConditionalUNet(TINY, rngs=nnx.Rngs(0)))
      >>> model.down_blocks[0].attentions[0].block.attn2.to_k.kernel.shape
      (12, 8)
    """

    def __init__(self, config: UNetConfig = PUBLISHED, *, rngs: nnx.Rngs):
        widths, depth = config.widths, config.blocks
        if any(width % config.groups or width % config.heads for width in widths):
            raise ValueError(
                f"config: got widths {widths}, expected multiples of groups, {config.groups}, and heads, {config.heads}"
            )
        self.width = widths[0]
        self.conv_in = conv(config.channels, widths[0], rngs=rngs)
        self.time_embedding = _Times(widths[0], 4 * widths[0], rngs=rngs)
        # Channels of the skip connections to the upward path, in the order of their creation.
        kept = [widths[0]]
        self.down_blocks: nnx.List[_Level] = nnx.List()
        for i, width in enumerate(widths):
            last = i == len(widths) - 1
            inputs = [kept[-1], *[width] * (depth - 1)]
            self.down_blocks.append(
                _Level(inputs, width, config, attends=not last, stride=None if last else 2, rngs=rngs)
            )
            kept += [width] * (depth if last else depth + 1)
        self.mid_block = _MidBlock(widths[-1], config, rngs=rngs)
        self.up_blocks: nnx.List[_Level] = nnx.List()
        before = widths[-1]
        for i, width in enumerate(reversed(widths)):
            inputs = [(before if j == 0 else width) + kept.pop() for j in range(depth + 1)]
            stride = 1 if i < len(widths) - 1 else None
            self.up_blocks.append(_Level(inputs, width, config, attends=i > 0, stride=stride, rngs=rngs))
            before = width
        self.conv_norm_out = norm(widths[0], num_groups=config.groups, epsilon=EPSILON, rngs=rngs)
        self.conv_out = conv(widths[0], config.channels, rngs=rngs)

    def __call__(self, x: jax.Array, t: jax.Array, embeddings: jax.Array) -> jax.Array:
        """Predicts the noise.

        Args:
          x: Noised latent images, `(n, height, width, channels)`.
          t: Times, ints `(n,)`, in [0, 1000) for the published weights.
          embeddings: Embedded text, `(n, tokens, context)`, as `TextEncoder` returns it.

        Returns:
          The predicted noise, shaped like `x`.

        Raises:
          ValueError: If height or width cannot be halved often enough.
        """
        unit = 2 ** (len(self.down_blocks) - 1)
        if x.shape[1] % unit or x.shape[2] % unit:
            raise ValueError(f"x: got shape {x.shape}, expected height and width to be multiples of {unit}")
        time = self.time_embedding(time_features(t, self.width).astype(x.dtype))
        x = self.conv_in(x)
        kept = [x]
        for level in self.down_blocks:
            for i in range(len(level.resnets)):
                x = level.block(i, x, time, embeddings)
                kept.append(x)
            if level.resize is not None:
                x = level.resize(x)
                kept.append(x)
        x = self.mid_block(x, time, embeddings)
        for level in self.up_blocks:
            for i in range(len(level.resnets)):
                x = level.block(i, jnp.concatenate([x, kept.pop()], axis=-1), time, embeddings)
            if level.resize is not None:
                x = level.resize(doubled(x))
        return self.conv_out(nnx.silu(self.conv_norm_out(x)))


def denoiser(model: nnx.Module) -> Callable:
    """The model as a pure function of its parameters.

    `tasks.diffusion` passes integer labels to the function it calls. With few prompts, let these index a table of
    embedded prompts, the last of which is the empty text:

        lambda params, x_t, t, labels: denoise(params, x_t.astype(table.dtype), t, table[labels])

    Args:
      model: A model to call with `(x_t, t, embeddings)`; only its structure is used, so it may come from
        `nnx.eval_shape`.

    Returns:
      `denoise(params, x_t, t, embeddings) -> prediction`, with parameters as from `nnx.to_pure_dict(nnx.state(model))`.

    Example:
      >>> model = nnx.eval_shape(lambda: ConditionalUNet(TINY, rngs=nnx.Rngs(0)))
      >>> params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
      >>> x_t, t, embeddings = jnp.ones((2, 8, 8, 4)), jnp.array([0, 999]), jnp.ones((2, 3, 12))
      >>> jax.eval_shape(denoiser(model), params, x_t, t, embeddings).shape
      (2, 8, 8, 4)
    """
    graph = nnx.graphdef(model)
    return lambda params, x_t, t, embeddings: nnx.merge(graph, params)(x_t, t, embeddings)
