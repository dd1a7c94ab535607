"""Residual networks for small colour images: ResNet-20 and ResNet-18."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from eupmu_jax.models.convolution import Conv

_conv = functools.partial(Conv, kernel_size=(3, 3), use_bias=False, kernel_init=nnx.initializers.he_normal())
_norm = functools.partial(nnx.BatchNorm, momentum=0.9)


class ResidualBlock(nnx.Module):
    """Two normalised 3x3 convolutions around a shortcut.

    Where shapes differ, the shortcut subsamples and pads with zero channels, which takes no parameters (option A of
    He et al. 2015), or is a normalised 1x1 convolution (option B).

    Args:
      in_channels: Channels of the input.
      out_channels: Channels of the output, at least `in_channels`.
      stride: Step of the first convolution and of the shortcut.
      projection: Whether a shortcut between different shapes is a convolution.
      rngs: Source of the keys of the parameters.

    Example:
      >>> block = ResidualBlock(4, 8, stride=2, rngs=nnx.Rngs(0))
      >>> block(jnp.zeros((1, 6, 6, 4))).shape
      (1, 3, 3, 8)
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int = 1, *, projection: bool = False, rngs: nnx.Rngs
    ):
        self.stride = stride
        self.new_channels = out_channels - in_channels
        self.conv1 = _conv(in_channels, out_channels, strides=stride, rngs=rngs)
        self.norm1 = _norm(out_channels, rngs=rngs)
        self.conv2 = _conv(out_channels, out_channels, rngs=rngs)
        self.norm2 = _norm(out_channels, rngs=rngs)
        self.projects = projection and (stride > 1 or self.new_channels > 0)
        if self.projects:
            self.conv3 = _conv(in_channels, out_channels, kernel_size=(1, 1), strides=stride, rngs=rngs)
            self.norm3 = _norm(out_channels, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `(n, height, width, in_channels)` to `(n, height / stride, width / stride, out_channels)`."""
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        if self.projects:
            return nnx.relu(y + self.norm3(self.conv3(x)))
        shortcut = jnp.pad(x[:, :: self.stride, :: self.stride], ((0, 0), (0, 0), (0, 0), (0, self.new_channels)))
        return nnx.relu(y + shortcut)


class _ResNet(nnx.Module):
    """Stages of `depth` blocks; each after the first halves the image. `widths` are their channels."""

    def __init__(
        self,
        widths: Sequence[int],
        depth: int,
        projection: bool,
        num_classes: int,
        in_channels: int,
        rngs: nnx.Rngs,
    ):
        channels = widths[0]
        self.conv = _conv(in_channels, channels, rngs=rngs)
        self.norm = _norm(channels, rngs=rngs)
        self.blocks: nnx.List[ResidualBlock] = nnx.List()
        for out_channels in widths:
            for _ in range(depth):
                # Every stage halves the image where it widens the channels.
                stride = out_channels // channels
                self.blocks.append(ResidualBlock(channels, out_channels, stride, projection=projection, rngs=rngs))
                channels = out_channels
        self.head = nnx.Linear(channels, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images of shape `(n, height, width, in_channels)` to logits of shape `(n, num_classes)`."""
        x = nnx.relu(self.norm(self.conv(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(axis=(1, 2)))


class ResNet20(_ResNet):
    """ResNet of depth 6n + 2 with n = 3 (He et al. 2015, section 4.2), 0.27 M parameters for ten classes.

    A new model is in training mode: it normalises by the batch and updates its running statistics, which are
    `flax.nnx.BatchStat` variables. Take `flax.nnx.view(model, use_running_average=True)` to evaluate. Inside
    `jax.grad` or `jax.vmap`, merge with `copy=True`: statistics that come from outside cannot be updated in place.

    Args:
      num_classes: Number of logits.
      in_channels: Channels of the images.
      rngs: Source of the keys of the parameters.

    Example:
      >>> model = ResNet20(10, rngs=nnx.Rngs(0))
      >>> graphdef, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)
      >>> evaluated = nnx.view(nnx.merge(graphdef, params, batch_stats), use_running_average=True)
      >>> jax.eval_shape(evaluated, jnp.zeros((2, 32, 32, 3))).shape
      (2, 10)
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3, *, rngs: nnx.Rngs):
        super().__init__((16, 32, 64), 3, False, num_classes, in_channels, rngs)


class ResNet18(_ResNet):
    """ResNet-18 (He et al. 2015, table 1, option B) for 32x32 images, 11.2 M parameters for ten classes.

    As usual for images of this size, the stem is one 3x3 convolution without stride, and no pooling follows it.
    Training, evaluation and statistics are as in `ResNet20`.

    Args:
      num_classes: Number of logits.
      in_channels: Channels of the images.
      rngs: Source of the keys of the parameters.

    Example:
      >>> model = nnx.eval_shape(lambda: ResNet18(10, rngs=nnx.Rngs(0)))
      >>> sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
      11173962
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3, *, rngs: nnx.Rngs):
        super().__init__((64, 128, 256, 512), 2, True, num_classes, in_channels, rngs)
