"""VGG-16 with batch normalisation for small images."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from eupmu_jax.models.convolution import Conv
from eupmu_jax.models.head import Head

# Channels of the convolutions before each pooling: configuration D of Simonyan and Zisserman.
_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG16(nnx.Module):
    """VGG-16 (Simonyan and Zisserman 2015, table 1, D) with BatchNorm, 14,728,266 parameters for ten colour classes.

    It has thirteen 3x3 convolutions with bias, each followed by BatchNorm and relu, a 2x2 max pooling with stride 2
    after each of five stages, the mean over the remaining pixels, and one linear layer. The count is made up of
    14,714,688 for the paper's convolutions, 8,448 for BatchNorm and 5,130 for the linear layer. `vgg16_bn` in the code
    of SalUn (Fan et al. 2024) differs: it has four poolings, no convolution bias and three linear layers, 15,311,818
    parameters.

    Pooling keeps an odd last row and column (`'SAME'` padding), so that 28x28 images, 28-14-7-4-2-1, need no resizing;
    on multiples of 32 this is the usual pooling. Training, evaluation and statistics are as in `ResNet20`.

    Args:
      num_classes: Number of logits.
      in_channels: Channels of the images.
      dtype: Dtype of the computation; promoted from images and parameters by default. Logits are float32 or wider.
      param_dtype: Dtype of the parameters.
      rngs: Source of the keys of the parameters.

    Example:
      >>> model = nnx.eval_shape(lambda: VGG16(10, rngs=nnx.Rngs(0)))
      >>> sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
      14728266
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        *,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        init = nnx.initializers.he_normal()
        self.convs: nnx.List[Conv] = nnx.List()
        self.norms: nnx.List[nnx.BatchNorm] = nnx.List()
        for out_channels in (channels for stage in _STAGES for channels in stage):
            self.convs.append(Conv(in_channels, out_channels, (3, 3), kernel_init=init, **options))
            self.norms.append(nnx.BatchNorm(out_channels, momentum=0.9, **options))
            in_channels = out_channels
        self.head = Head(in_channels, num_classes, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images of shape `(n, height, width, in_channels)` to logits of shape `(n, num_classes)`."""
        layers = zip(self.convs, self.norms, strict=True)
        for stage in _STAGES:
            for _ in stage:
                conv, norm = next(layers)
                x = nnx.relu(norm(conv(x)))
            x = nnx.max_pool(x, (2, 2), (2, 2), "SAME")
        return self.head(x.mean(axis=(1, 2)))
