"""Fine-tuning: training continues on the retain set alone, and the forget set is left to be forgotten."""

from eupmu_jax.methods.method import (
    LEARNING_RATE,
    MOMENTUM,
    Cost,
    LogUniform,
    Method,
    Procedure,
    descend,
    descent,
    retain_gradient,
)


def fine_tuning(task, terms, settings) -> Procedure:
    """Descent on the retain batch's loss.

    A model that fits its training set has next to no gradient there, so little is forgotten unless the steps are large.
    """
    gradient = lambda params, prepared, batches, count, key: retain_gradient(task, params, batches[1], key)
    return descend(descent(terms, settings), gradient, Cost((0, 1), (0, 1)))


METHOD = Method(
    fine_tuning,
    paper="Warnecke et al. 2021, arXiv 2108.11577",
    passes="1F 1B retain",
    needs="retain set",
    space={"learning_rate": LEARNING_RATE, "momentum": MOMENTUM, "weight_decay": LogUniform(1e-6, 1e-2)},
)
