"""ResNet-20 for small colour images."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from eupmu_jax.models.convolution import Conv

_conv = functools.partial(Conv, kernel_size=(3, 3), use_bias=False, kernel_init=nnx.initializers.he_normal())
_norm = functools.partial(nnx.BatchNorm, momentum=0.9)


class ResidualBlock(nnx.Module):
    """Two normalised 3x3 convolutions around a parameter-free shortcut.

    Args:
      in_channels: Channels of the input.
      out_channels: Channels of the output, at least `in_channels`.
      stride: Step of the first convolution and of the shortcut.
      rngs: Source of the keys of the parameters.

    Example:
      >>> block = ResidualBlock(4, 8, stride=2, rngs=nnx.Rngs(0))
      >>> block(jnp.zeros((1, 6, 6, 4))).shape
      (1, 3, 3, 8)
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, *, rngs: nnx.Rngs):
        self.stride = stride
        self.new_channels = out_channels - in_channels
        self.conv1 = _conv(in_channels, out_channels, strides=stride, rngs=rngs)
        self.norm1 = _norm(out_channels, rngs=rngs)
        self.conv2 = _conv(out_channels, out_channels, rngs=rngs)
        self.norm2 = _norm(out_channels, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `(n, height, width, in_channels)` to `(n, height / stride, width / stride, out_channels)`."""
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        # Option A of the paper: subsample and pad with zero channels, which adds no parameters.
        shortcut = jnp.pad(x[:, :: self.stride, :: self.stride], ((0, 0), (0, 0), (0, 0), (0, self.new_channels)))
        return nnx.relu(y + shortcut)


class ResNet20(nnx.Module):
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
        self.conv = _conv(in_channels, 16, rngs=rngs)
        self.norm = _norm(16, rngs=rngs)
        self.blocks: nnx.List[ResidualBlock] = nnx.List()
        channels = 16
        for out_channels in (16, 32, 64):
            for _ in range(3):
                # Every stage halves the image where it widens the channels.
                stride = out_channels // channels
                self.blocks.append(ResidualBlock(channels, out_channels, stride, rngs=rngs))
                channels = out_channels
        self.head = nnx.Linear(channels, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images of shape `(n, height, width, in_channels)` to logits of shape `(n, num_classes)`."""
        x = nnx.relu(self.norm(self.conv(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(axis=(1, 2)))
