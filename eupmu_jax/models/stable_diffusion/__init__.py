"""Stable Diffusion 1.x in Flax NNX: text encoder, autoencoder, U-Net, schedule, and the published weights."""

from eupmu_jax.models.stable_diffusion.autoencoder import Autoencoder, AutoencoderConfig, latents
from eupmu_jax.models.stable_diffusion.schedule import published_schedule
from eupmu_jax.models.stable_diffusion.text_encoder import TextEncoder, TextEncoderConfig
from eupmu_jax.models.stable_diffusion.unet import ConditionalUNet, UNetConfig, denoiser
from eupmu_jax.models.stable_diffusion.weights import load

__all__ = [
    "Autoencoder",
    "AutoencoderConfig",
    "ConditionalUNet",
    "TextEncoder",
    "TextEncoderConfig",
    "UNetConfig",
    "denoiser",
    "latents",
    "load",
    "published_schedule",
]
