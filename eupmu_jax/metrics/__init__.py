"""Metrics of an unlearned model: pure functions of logits and labels, or of texts, computed on the host."""

from eupmu_jax.metrics.classification import GAP_METRICS, accuracy, average_gap, confidence, evaluate, kl, mean_loss
from eupmu_jax.metrics.intervals import Interval, paired_interval, tied
from eupmu_jax.metrics.language import (
    ForgetQuality,
    answer_probability,
    choice_probability,
    exact_memorisation,
    extraction_strength,
    forget_quality,
    model_utility,
    truth_ratio,
    truth_score,
)
from eupmu_jax.metrics.lira import attack_figures, leave_pair_out, lira_statistic, u_lira
from eupmu_jax.metrics.membership import FEATURES, features, svc_attack, svc_confidence_attack
from eupmu_jax.metrics.memorisation import memorisation_scores
from eupmu_jax.metrics.quantisation import rounded
from eupmu_jax.metrics.rouge import RougeL, knowmem, rouge_l, verbmem
from eupmu_jax.metrics.text_membership import min_k, privleak, separation

__all__ = [
    "FEATURES",
    "GAP_METRICS",
    "ForgetQuality",
    "Interval",
    "RougeL",
    "accuracy",
    "answer_probability",
    "attack_figures",
    "average_gap",
    "choice_probability",
    "confidence",
    "evaluate",
    "exact_memorisation",
    "extraction_strength",
    "features",
    "forget_quality",
    "kl",
    "knowmem",
    "leave_pair_out",
    "lira_statistic",
    "mean_loss",
    "memorisation_scores",
    "min_k",
    "model_utility",
    "paired_interval",
    "privleak",
    "rouge_l",
    "rounded",
    "separation",
    "svc_attack",
    "svc_confidence_attack",
    "tied",
    "truth_ratio",
    "truth_score",
    "u_lira",
    "verbmem",
]
