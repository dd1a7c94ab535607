"""Figures that judge an unlearned model: pure functions of logits and labels, on the host."""

from eupmu_jax.metrics.classification import GAP_METRICS, accuracy, average_gap, confidence, evaluate, kl, mean_loss
from eupmu_jax.metrics.intervals import Interval, paired_interval, tied
from eupmu_jax.metrics.lira import attack_figures, leave_pair_out, lira_statistic, u_lira
from eupmu_jax.metrics.membership import FEATURES, features, svc_attack, svc_confidence_attack
from eupmu_jax.metrics.memorisation import memorisation_scores

__all__ = [
    "FEATURES",
    "GAP_METRICS",
    "Interval",
    "accuracy",
    "attack_figures",
    "average_gap",
    "confidence",
    "evaluate",
    "features",
    "kl",
    "leave_pair_out",
    "lira_statistic",
    "mean_loss",
    "memorisation_scores",
    "paired_interval",
    "svc_attack",
    "svc_confidence_attack",
    "tied",
    "u_lira",
]
