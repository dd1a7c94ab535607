"""SCRUB: the student leaves its teacher on the forget set and stays with it on the retain set."""

import jax

from eupmu_jax.methods.method import (
    LEARNING_RATE,
    Choice,
    Cost,
    LogUniform,
    Method,
    Procedure,
    descend,
    descent,
    keep_original,
    softened,
)

# The paper's weight of the retain loss, and the temperature of both divergences.
RETAIN_WEIGHT = 0.99
TEMPERATURE = 4.0


def scrub(task, terms, settings) -> Procedure:
    r"""Alternating max-steps on the forget batch and min-steps on the retain batch; then min-steps alone.

    The teacher t is the original model, the student s starts as a copy of it, and D is the task's divergence at the
    temperature T = 4, for a classifier T^2 times the mean of KL(softmax(t / T) || softmax(s / T)):

    .. math::
      \text{max: } \theta \leftarrow \theta + \alpha_t \nabla D(\text{forget}) \qquad
      \text{min: } \theta \leftarrow \theta - \alpha_t \nabla (0.99\, l_r + \alpha\, D(\text{retain}))

    In the first `max_share` of the run even steps are max-steps, so that a run ends with repair unless `max_share` is
    next to 1. The paper alternates whole passes over the two sets: 2 to 5 max-passes in 3 to 10 epochs, learning rate
    5e-4, momentum 0.9, T = 4 and alpha = 0.001 (0.5 on small sets). Adam's first moment carries part of the ascent into
    the min-steps that follow it; with `momentum` 0 it does not.

    A step pays for one branch only: student forwards and backwards and teacher forwards on one of the two batches; the
    cost is the average over the run. On CPU, XLA is slow at the gradients of convolutions inside a branch, so the share
    of time is well above that of passes.

    Failure cases: D has no bound, so long or large ascent ruins the model beyond repair. Its gradient is zero where
    student and teacher agree: the first max-step follows only rounding error, which Adam scales to a full step, and
    forgetting starts once a min-step has moved the student.
    """
    max_until = settings["max_share"] * terms.steps

    def divergence(params, teacher, batch, key):
        outputs = task.outputs(params, batch, key)
        return outputs, softened(task, outputs, task.outputs(teacher, batch, key), batch, TEMPERATURE)

    def forget_loss(params, teacher, batches, key):
        return -divergence(params, teacher, batches[0], key)[1]

    def retain_loss(params, teacher, batches, key):
        outputs, distance = divergence(params, teacher, batches[1], key)
        return RETAIN_WEIGHT * task.retain(outputs, batches[1]) + settings["alpha"] * distance

    def gradient(params, teacher, batches, count, key):
        is_max = (count < max_until) & (count % 2 == 0)
        return jax.lax.cond(is_max, jax.grad(forget_loss), jax.grad(retain_loss), params, teacher, batches, key)

    share = -(-max_until // 2) / terms.steps
    cost = Cost((2 * share, 2 * (1 - share)), (share, 1 - share))
    return descend(descent(terms, settings), gradient, cost, keep_original)


METHOD = Method(
    scrub,
    paper="Kurmanji et al. 2023, arXiv 2302.09880",
    passes="2F 1B of one batch a step, including the teacher's 1F: forget and retain in turn, then only retain",
    needs="forget and retain sets",
    space={
        "learning_rate": LEARNING_RATE,
        "alpha": LogUniform(0.001, 1.0),
        "max_share": Choice((0.25, 0.5, 0.75)),
    },
    requires=("divergence",),
)
