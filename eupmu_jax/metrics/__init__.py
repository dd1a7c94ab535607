"""Figures that judge an unlearned model."""

from eupmu_jax.metrics.classification import GAP_METRICS, accuracy, average_gap, confidence, evaluate, mean_loss
from eupmu_jax.metrics.membership import svc_confidence_attack
from eupmu_jax.metrics.memorisation import memorisation_scores

__all__ = [
    "GAP_METRICS",
    "accuracy",
    "average_gap",
    "confidence",
    "evaluate",
    "mean_loss",
    "memorisation_scores",
    "svc_confidence_attack",
]
