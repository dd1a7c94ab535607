"""A U-Net for the diffusion of small images."""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from eupmu_jax._stack.checks import check_int
from eupmu_jax.models.convolution import Conv
from eupmu_jax.models.dit import Conditions, images_of, patches_of, time_features

# One zero on every side, so that windows with stride two are aligned with those without a stride.
_conv = functools.partial(Conv, kernel_size=(3, 3), padding=1)


class UNetBlock(nnx.Module):
    """Two normalised 3x3 convolutions with a shortcut; a condition scales and shifts between them.

    The second convolution is initialised to zero, so the block starts as its shortcut: the identity, or a 1x1
    convolution if the number of channels changes.

    Args:
      in_channels: Channels of the input, a multiple of `groups`.
      channels: Channels of the output, a multiple of `groups`.
      condition: Width of the condition.
      groups: Number of groups in group normalisation.
      rngs: Source of the keys of the parameters.

    Example:
      >>> x, condition = jnp.ones((1, 5, 5, 4)), jnp.ones((1, 6))
      >>> nnx.eval_shape(lambda: UNetBlock(4, 8, 6, 2, rngs=nnx.Rngs(0))(x, condition)).shape
      (1, 5, 5, 8)
    """

    def __init__(self, in_channels: int, channels: int, condition: int, groups: int, *, rngs: nnx.Rngs):
        zeros = nnx.initializers.zeros
        self.norm1 = nnx.GroupNorm(in_channels, num_groups=groups, rngs=rngs)
        self.conv1 = _conv(in_channels, channels, rngs=rngs)
        self.modulation = nnx.Linear(condition, 2 * channels, rngs=rngs)
        self.norm2 = nnx.GroupNorm(channels, num_groups=groups, rngs=rngs)
        self.conv2 = _conv(channels, channels, kernel_init=zeros, rngs=rngs)
        self.projects = in_channels != channels
        if self.projects:
            self.shortcut = nnx.Linear(in_channels, channels, rngs=rngs)

    def __call__(self, x: jax.Array, condition: jax.Array) -> jax.Array:
        """Maps `(n, height, width, in_channels)` to `(n, height, width, channels)`, under `(n, condition)`."""
        scale, shift = jnp.split(self.modulation(nnx.silu(condition))[:, None, None], 2, axis=-1)
        y = self.conv1(nnx.silu(self.norm1(x)))
        y = self.conv2(nnx.silu(self.norm2(y) * (1 + scale) + shift))
        if self.projects:
            # Flat, as XLA multiplies two-dimensional matrices faster on a CPU.
            x = self.shortcut(x.reshape(-1, x.shape[-1])).reshape(y.shape)
        return x + y


class UNet(nnx.Module):
    """U-Net with classes as conditions (Ho et al. 2020, arXiv 2006.11239, appendix B), on patches of the image.

    Patches keep the convolutions small: 28x28 images become 14x14 and 7x7. Each level has `blocks` blocks in the
    downward path, whose outputs are concatenated to the inputs of the blocks in the upward path; the lowest level has
    attention in between. The last layer is initialised to zero, so that the first prediction is 0. The default sizes,
    for Fashion-MNIST, have 0.64 M parameters for ten classes.

    Args:
      num_conditions: Number of classes; one more label stands for no class.
      in_channels: Channels of the images.
      patch_size: Height and width of a patch.
      widths: Channels of each level, multiples of `groups` and of `heads`, the first of them even; each level after the
        first halves height and width.
      blocks: Blocks per level in each of the two paths.
      groups: Number of groups in group normalisation.
      heads: Number of attention heads.
      rngs: Source of the keys of the parameters.

    Raises:
      ValueError: If there is no level, for another number below 1, or for an invalid width.

    Example:
      >>> model = nnx.eval_shape(lambda: UNet(10, rngs=nnx.Rngs(0)))
      >>> sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
      635876
      >>> graph, params = nnx.split(model, nnx.Param)
      >>> denoise = lambda params, x, t, labels: nnx.merge(graph, params)(x, t, labels)
      >>> jax.eval_shape(denoise, params, jnp.ones((3, 28, 28, 1)), jnp.zeros(3), jnp.array([0, 1, 10])).shape
      (3, 28, 28, 1)
    """

    def __init__(
        self,
        num_conditions: int,
        in_channels: int = 1,
        patch_size: int = 2,
        widths: tuple[int, ...] = (32, 64),
        blocks: int = 2,
        groups: int = 8,
        heads: int = 4,
        *,
        rngs: nnx.Rngs,
    ):
        counts = {"num_conditions": num_conditions, "in_channels": in_channels, "patch_size": patch_size}
        counts |= {"blocks": blocks, "groups": groups, "heads": heads}
        for name, value in counts.items():
            check_int(name, value, 1, static=True)
        if not widths or any(width < 1 or width % math.lcm(groups, heads, 2) for width in widths):
            raise ValueError(f"widths: got {widths}, expected even multiples of groups, {groups}, and heads, {heads}")
        self.in_channels, self.patch_size, self.width = in_channels, patch_size, widths[0]
        numbers, condition = patch_size**2 * in_channels, 4 * widths[0]
        block = functools.partial(UNetBlock, condition=condition, groups=groups, rngs=rngs)
        self.times = nnx.Linear(self.width, condition, rngs=rngs)
        self.times_out = nnx.Linear(condition, condition, rngs=rngs)
        small = nnx.initializers.normal(0.02)
        self.conditions = Conditions(num_conditions + 1, condition, embedding_init=small, rngs=rngs)
        self.patches = _conv(numbers, widths[0], rngs=rngs)
        self.down = nnx.List(
            nnx.List(block(before if i == 0 else width, width) for i in range(blocks))
            for before, width in zip((widths[0], *widths), widths, strict=False)
        )
        self.shrink = nnx.List(_conv(width, width, strides=2, rngs=rngs) for width in widths[:-1])
        self.attention_norm = nnx.GroupNorm(widths[-1], num_groups=groups, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, widths[-1], decode=False, rngs=rngs)
        self.up = nnx.List(nnx.List(block(2 * width, width) for _ in range(blocks)) for width in widths[::-1])
        self.grow = nnx.List(
            _conv(width, above, rngs=rngs) for width, above in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )
        self.norm = nnx.GroupNorm(widths[0], num_groups=groups, rngs=rngs)
        self.out = _conv(widths[0], numbers, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, x: jax.Array, t: jax.Array, labels: jax.Array) -> jax.Array:
        """Predicts for noised images.

        Args:
          x: `(n, height, width, channels)`.
          t: Times, ints `(n,)`.
          labels: Ints `(n,)`; `num_conditions` itself stands for no condition.

        Returns:
          The predictions, shaped like `x`.

        Raises:
          ValueError: If height or width is not a multiple of the patch size times 2 for each halving, for a number of
            channels other than the model was built for, or for labels that are not conditions.
        """
        unit = self.patch_size * 2 ** len(self.shrink)
        if x.ndim != 4 or x.shape[1] % unit or x.shape[2] % unit or x.shape[3] != self.in_channels:
            raise ValueError(
                f"x: got shape {x.shape}, expected height and width to be multiples of {unit}, and {self.in_channels} "
                "channels"
            )
        h = self.patches(patches_of(x, self.patch_size))
        times = self.times(time_features(t, self.width).astype(x.dtype))
        condition = self.times_out(nnx.silu(times)) + self.conditions(labels).astype(x.dtype)

        kept = []
        for level, blocks in enumerate(self.down):
            if level:
                h = self.shrink[level - 1](h)
            for block in blocks:
                h = block(h, condition)
                kept.append(h)
        h = h + self.attention(self.attention_norm(h).reshape(len(h), -1, h.shape[-1])).reshape(h.shape)
        for level, blocks in enumerate(self.up):
            if level:
                h = self.grow[level - 1](h.repeat(2, axis=1).repeat(2, axis=2))
            for block in blocks:
                h = block(jnp.concatenate([h, kept.pop()], axis=-1), condition)

        return images_of(self.out(nnx.silu(self.norm(h))), self.patch_size)
