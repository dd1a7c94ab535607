"""Small Flax NNX models to unlearn with."""

from eupmu_jax.models.cnn import SmallCNN
from eupmu_jax.models.convolution import Conv, conv2d
from eupmu_jax.models.decoder import Decoder, DecoderSize, decoder_shardings
from eupmu_jax.models.mlp import MLP
from eupmu_jax.models.resnet import ResNet18, ResNet20
from eupmu_jax.models.transformer import Transformer

__all__ = [
    "MLP",
    "Conv",
    "Decoder",
    "DecoderSize",
    "ResNet18",
    "ResNet20",
    "SmallCNN",
    "Transformer",
    "conv2d",
    "decoder_shardings",
]
