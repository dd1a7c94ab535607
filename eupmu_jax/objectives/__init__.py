"""Forget and retain losses. Everything is minimised."""

from eupmu_jax.objectives import diffusion, language
from eupmu_jax.objectives.classification import (
    bounded_ascent,
    cross_entropy,
    gradient_ascent,
    kl_to_teacher,
    kl_to_uniform,
    random_labels,
)
from eupmu_jax.objectives.scores import log_odds, sequence_log_odds, transport, transport_targets

__all__ = [
    "bounded_ascent",
    "cross_entropy",
    "diffusion",
    "gradient_ascent",
    "kl_to_teacher",
    "kl_to_uniform",
    "language",
    "log_odds",
    "random_labels",
    "sequence_log_odds",
    "transport",
    "transport_targets",
]
