"""Residual networks for small images: ResNet-8, ResNet-20 and ResNet-18."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from eupmu_jax.models.convolution import Conv
from eupmu_jax.models.head import Head

# One zero on every side, as in He et al. and PyTorch. With stride two, 'SAME' would put the zeros after the image and
# shift the windows by one pixel against those of the shortcut.
_conv = functools.partial(Conv, kernel_size=(3, 3), padding=1, use_bias=False, kernel_init=nnx.initializers.he_normal())
_norm = functools.partial(nnx.BatchNorm, momentum=0.9)


class ResidualBlock(nnx.Module):
    """Two normalised 3x3 convolutions with a shortcut.

    If shapes differ, the shortcut subsamples and pads with zero channels, which takes no parameters (option A of He et
    al. 2015), or is a normalised 1x1 convolution (option B).

    Args:
      in_channels: Channels of the input.
      out_channels: Channels of the output, at least `in_channels`.
      stride: Step of the first convolution and of the shortcut.
      projection: Whether a shortcut between different shapes is a convolution.
      dtype: Dtype of the computation; by default the promoted dtype of activations and parameters.
      param_dtype: Dtype of the parameters.
      rngs: Source of the keys of the parameters.

    Example:
      >>> nnx.eval_shape(lambda: ResidualBlock(4, 8, stride=2, rngs=nnx.Rngs(0))(jnp.zeros((1, 6, 6, 4)))).shape
      (1, 3, 3, 8)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        *,
        projection: bool = False,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.stride = stride
        self.new_channels = out_channels - in_channels
        self.conv1 = _conv(in_channels, out_channels, strides=stride, **options)
        self.norm1 = _norm(out_channels, **options)
        self.conv2 = _conv(out_channels, out_channels, **options)
        self.norm2 = _norm(out_channels, **options)
        self.projects = projection and (stride > 1 or self.new_channels > 0)
        if self.projects:
            self.conv3 = _conv(in_channels, out_channels, kernel_size=(1, 1), padding=0, strides=stride, **options)
            self.norm3 = _norm(out_channels, **options)

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

    widths: tuple[int, ...]
    depth: int
    projection: bool

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        *,
        stem_stride: int = 1,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        channels = self.widths[0]
        self.conv = _conv(in_channels, channels, strides=stem_stride, **options)
        self.norm = _norm(channels, **options)
        self.blocks: nnx.List[ResidualBlock] = nnx.List()
        for out_channels in self.widths:
            for _ in range(self.depth):
                # Every stage halves the image where it widens the channels.
                stride = out_channels // channels
                block = ResidualBlock(channels, out_channels, stride, projection=self.projection, **options)
                self.blocks.append(block)
                channels = out_channels
        self.head = Head(channels, num_classes, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images of shape `(n, height, width, in_channels)` to logits of shape `(n, num_classes)`."""
        x = nnx.relu(self.norm(self.conv(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(axis=(1, 2)))


class ResNet20(_ResNet):
    """ResNet of depth 6n + 2 with n = 3 (He et al. 2015, section 4.2), 0.27 M parameters for ten classes.

    A new model is in training mode: it normalises by the batch and updates its running statistics, which are
    `flax.nnx.BatchStat` variables. Use `flax.nnx.view(model, use_running_average=True)` to evaluate. Inside
    `jax.grad` or `jax.vmap`, merge with `copy=True`, as statistics from outside cannot be updated in place, or use the
    pure function of parameters and statistics from `eupmu_jax.models.functional`.

    Running statistics become `0.9 * old + 0.1 * batch`. The variance of the batch is the biased one, whereas PyTorch
    keeps the unbiased one, `m / (m - 1)` times as large for `m` values per channel. With PyTorch's statistics the
    forward pass equals PyTorch's.

    Args:
      num_classes: Number of logits.
      in_channels: Channels of the images.
      stem_stride: Step of the first convolution; 2 takes a quarter of the operations.
      dtype: Dtype of the computation; promoted from images and parameters by default. Logits are float32 or wider.
      param_dtype: Dtype of the parameters.
      rngs: Source of the keys of the parameters.

    Example:
      >>> evaluated = lambda: nnx.view(ResNet20(10, rngs=nnx.Rngs(0)), use_running_average=True)
      >>> nnx.eval_shape(lambda: evaluated()(jnp.zeros((2, 32, 32, 3)))).shape
      (2, 10)
    """

    widths, depth, projection = (16, 32, 64), 3, False


class ResNet8(_ResNet):
    """ResNet of depth 6n + 2 with n = 1 (He et al. 2015, section 4.2), 0.08 M parameters for ten classes.

    For small machines: a third of the operations of `ResNet20`, which has the details.

    Args:
      num_classes: Number of logits.
      in_channels: Channels of the images.
      stem_stride: Step of the first convolution; 2 takes a quarter of the operations.
      dtype: Dtype of the computation; promoted from images and parameters by default. Logits are float32 or wider.
      param_dtype: Dtype of the parameters.
      rngs: Source of the keys of the parameters.

    Example:
      >>> model = nnx.eval_shape(lambda: ResNet8(10, rngs=nnx.Rngs(0)))
      >>> sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
      75290
    """

    widths, depth, projection = (16, 32, 64), 1, False


class ResNet18(_ResNet):
    """ResNet-18 (He et al. 2015, table 1, option B) for 32x32 images, 11.2 M parameters for ten classes.

    As usual for images of this size, the stem is one 3x3 convolution without stride, and no pooling follows it.
    Training, evaluation and statistics are as in `ResNet20`.

    Args:
      num_classes: Number of logits.
      in_channels: Channels of the images.
      stem_stride: Step of the first convolution; 2 takes a quarter of the operations.
      dtype: Dtype of the computation; promoted from images and parameters by default. Logits are float32 or wider.
      param_dtype: Dtype of the parameters.
      rngs: Source of the keys of the parameters.

    Example:
      >>> model = nnx.eval_shape(lambda: ResNet18(10, rngs=nnx.Rngs(0)))
      >>> sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
      11173962
    """

    widths, depth, projection = (64, 128, 256, 512), 2, True
