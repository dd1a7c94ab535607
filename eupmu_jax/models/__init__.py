"""Small Flax NNX models to unlearn with."""

from eupmu_jax.models.cnn import SmallCNN
from eupmu_jax.models.convolution import Conv, conv2d
from eupmu_jax.models.decoder import Decoder, DecoderSize, decoder_shardings
from eupmu_jax.models.functional import fold, functional
from eupmu_jax.models.mlp import MLP
from eupmu_jax.models.resnet import ResNet8, ResNet18, ResNet20
from eupmu_jax.models.transformer import Transformer
from eupmu_jax.models.vgg import VGG16
from eupmu_jax.models.vit import ViT

__all__ = [
    "MLP",
    "VGG16",
    "Conv",
    "Decoder",
    "DecoderSize",
    "ResNet8",
    "ResNet18",
    "ResNet20",
    "SmallCNN",
    "Transformer",
    "ViT",
    "conv2d",
    "decoder_shardings",
    "fold",
    "functional",
]
