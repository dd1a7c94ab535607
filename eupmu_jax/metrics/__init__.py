"""Figures that judge an unlearned model."""

from eupmu_jax.metrics.classification import accuracy, average_gap, confidence, evaluate, mean_loss
from eupmu_jax.metrics.membership import svc_confidence_attack

__all__ = ["accuracy", "average_gap", "confidence", "evaluate", "mean_loss", "svc_confidence_attack"]
