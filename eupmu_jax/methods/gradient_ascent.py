"""Gradient ascent on the forget set alone."""

import jax

from eupmu_jax.methods.method import (
    ASCENT,
    MOMENTUM,
    Choice,
    Cost,
    LogUniform,
    Method,
    Procedure,
    descend,
    descent,
    loss_of,
)


def gradient_ascent(task, terms, settings) -> Procedure:
    """Descent on minus the forget batch's loss, or on another objective that needs no retain data.

    Nothing holds it back: without a bound on the objective, the loss on everything rises, so its learning rates are
    smaller. `ascent_objective` is "gradient_ascent" by default. A run without any settings takes instead the
    first of the task's forget losses that is in the search space: for a classifier `bounded_ascent`.
    """
    name = settings.get("ascent_objective", ASCENT)
    if name not in task.forget:
        raise ValueError(
            f"settings: got no 'ascent_objective', and the task has no forget loss named {name!r}; expected it to "
            f"be one of {', '.join(task.forget)}"
        )
    loss = loss_of(task, name)

    def gradient(params, prepared, batches, count, key):
        return jax.grad(lambda p: loss.heads[0](loss.forward(p, batches[0], key), batches[0]))(params)

    return descend(descent(terms, settings), gradient, Cost((1, 0), (1, 0)))


METHOD = Method(
    gradient_ascent,
    paper="Thudi et al. 2022, arXiv 2109.13398",
    passes="1F 1B forget",
    needs="forget set",
    space={
        "learning_rate": LogUniform(3e-5, 1e-3),
        "ascent_objective": Choice(("gradient_ascent", "bounded_ascent", "kl_to_uniform")),
        "momentum": MOMENTUM,
    },
)
