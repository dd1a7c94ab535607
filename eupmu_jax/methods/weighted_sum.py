"""Linear scalarisation: the forget objective plus a fixed weight times the retain loss."""

from eupmu_jax.gradients.value_and_grad import scalarized_value_and_grad
from eupmu_jax.methods.method import (
    FORGET_OBJECTIVE,
    LEARNING_RATE,
    Cost,
    LogUniform,
    Method,
    Procedure,
    descend,
    descent,
    loss_of,
)


def weighted_sum(task, terms, settings) -> Procedure:
    r"""Descent on :math:`l_f + w\, l_r` with w = `retain_weight`; one backward pass over both batches.

    The right weight depends on the objective and on the learning rate: half or twice that weight can ruin the run.
    """
    value_and_grad = scalarized_value_and_grad(loss_of(task, settings["forget_objective"]))

    def gradient(params, prepared, batches, count, key):
        return value_and_grad(params, batches, settings["retain_weight"], key)[1]

    return descend(descent(terms, settings), gradient, Cost((1, 1), (1, 1)))


METHOD = Method(
    weighted_sum,
    paper="linear scalarisation",
    passes="1F 1B forget and retain",
    needs="forget and retain sets",
    space={
        "learning_rate": LEARNING_RATE,
        "forget_objective": FORGET_OBJECTIVE,
        "retain_weight": LogUniform(0.3, 30.0),
    },
)
