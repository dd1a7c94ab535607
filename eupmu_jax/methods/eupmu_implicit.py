"""EUPMU with the implicit multiplier: one gradient of the weighted sum, and a measurement of what the step did."""

import optax

from eupmu_jax.methods.eupmu_explicit import FAMILY, PAPER
from eupmu_jax.methods.method import (
    FORGET_OBJECTIVE,
    LEARNING_RATE,
    Choice,
    Cost,
    LogUniform,
    Method,
    Procedure,
    descent,
    learning_rate,
    loss_of,
)
from eupmu_jax.surgery.implicit import implicit_surgery
from eupmu_jax.surgery.nonfinite import skip_nonfinite
from eupmu_jax.surgery.steps import implicit_step


def implicit_descent(
    task, terms, settings, surgery: optax.GradientTransformation, forward: tuple[int, int]
) -> Procedure:
    """Descent on the weighted sum with the multiplier that `surgery` moves; steps that are not finite are skipped."""
    optimizer = skip_nonfinite(optax.chain(descent(terms, settings), surgery))
    take = implicit_step(loss_of(task, settings["forget_objective"]), optimizer)
    step = lambda params, prepared, state, batches, count, key: take(params, state, batches, key)[:2]
    return Procedure(lambda params, prepared: optimizer.init(params), step, Cost(forward, (1, 1)))


def _implicit(task, terms, settings, proxy, forward):
    sum_of_learning_rates = settings["learning_rate"] * (terms.steps + 1) / 2
    # Without any step there is nothing to divide it among.
    stays = isinstance(sum_of_learning_rates, float) and sum_of_learning_rates == 0
    surgery = implicit_surgery(
        0.0 if stays else settings.get("allowed_rise", 0.0) / sum_of_learning_rates,
        optax.sgd(settings["multiplier_learning_rate"]),
        proxy=proxy,
        learning_rate=learning_rate(terms, settings),
        initial_multiplier=settings.get("retain_weight", 0.0),
    )
    return implicit_descent(task, terms, settings, surgery, forward)


def eupmu_implicit(task, terms, settings) -> Procedure:
    """A second forward pass over the retain batch measures the step.

    The tolerances of all steps add up to `allowed_rise`, and the first multiplier is `retain_weight`; both are 0 by
    default.
    """
    return _implicit(task, terms, settings, "same_batch", (1, 2))


def eupmu_next_batch(task, terms, settings) -> Procedure:
    """As `eupmu_implicit`, but the next batch measures the step, at no cost and with the noise between batches."""
    return _implicit(task, terms, settings, "next_batch", (1, 1))


_SPACE: dict[str, LogUniform | Choice] = {
    "learning_rate": LEARNING_RATE,
    "forget_objective": FORGET_OBJECTIVE,
    "multiplier_learning_rate": LogUniform(0.1, 100.0),
}
_NEEDS = "forget and retain sets"

_OPTIONAL = ("allowed_rise", "retain_weight")

METHOD = Method(eupmu_implicit, PAPER, "2F 1B retain, 1F 1B forget", _NEEDS, _SPACE, optional=_OPTIONAL, family=FAMILY)
NEXT_BATCH_METHOD = Method(
    eupmu_next_batch, PAPER, "1F 1B forget and retain", _NEEDS, _SPACE, optional=_OPTIONAL, family=FAMILY
)
