"""EUPMU in closed form: unilateral surgery on stacked gradients, with the paper's tolerance or under a budget."""

import optax

from eupmu_jax import tolerances
from eupmu_jax._stack.checks import is_traced
from eupmu_jax.methods.method import (
    FORGET_OBJECTIVE,
    LEARNING_RATE,
    Cost,
    LogUniform,
    Method,
    Procedure,
    descent,
    loss_of,
)
from eupmu_jax.surgery.explicit import unilateral_surgery
from eupmu_jax.surgery.nonfinite import skip_nonfinite
from eupmu_jax.surgery.steps import explicit_step

PAPER = "EUPMU, arXiv 2510.22124"
FAMILY = "EUPMU"
# Rate of the budget in units of 1 / learning rate. Above 1 the demanded decrease would overshoot if clipping did not
# turn every demand into a step of the usual length, which the retain gradient then dominates. Picked by hand and not
# part of the equal tuning: for SGD among 3, 10, 30 and 100 on digits, seed 0; for Adam among 0.003, 0.01, 0.03, 0.1 and
# 1 on Fashion-MNIST, random:10%, the small CNN, the tuning seed. For Muon none was tried.
BARRIER_RATE = {"sgd": 100.0, "adam": 1.0, "muon": 1.0}


def explicit_descent(task, settings, optimizer: optax.GradientTransformation) -> Procedure:
    """Steps with stacked forget and retain gradients."""
    take = explicit_step(loss_of(task, settings["forget_objective"]), optimizer)
    step = lambda params, prepared, state, batches, count, key: take(params, state, batches, key)[:2]
    return Procedure(lambda params, prepared: optimizer.init(params), step, Cost((1, 1), (1, 1)))


def stacked_descent(task, terms, settings, transform: optax.GradientTransformation) -> Procedure:
    """Descent after a transform of the stacked forget and retain gradients; steps that are not finite are skipped."""
    return explicit_descent(task, settings, skip_nonfinite(optax.chain(transform, descent(terms, settings))))


def eupmu_step(task, terms, settings) -> Procedure:
    """The closed form as published: a step may raise the retain loss by its learning rate times `tolerance`.

    This holds to first order, on its own batch and for plain gradient descent; clipping and Adam change what a step
    does.
    """
    return stacked_descent(task, terms, settings, unilateral_surgery(settings["tolerance"]))


def eupmu_explicit(task, terms, settings) -> Procedure:
    """The closed form under a budget: over the whole run, the retain loss may rise by `allowed_rise`, in nats.

    Its tolerance is a barrier on the level (`tolerances.budget`), read on each minibatch.
    """
    return stacked_descent(task, terms, settings, unilateral_surgery(barrier(terms, settings)))


def barrier(terms, settings, firmness: float = 1.0) -> tolerances.Tolerance:
    """The budget of `allowed_rise` nats above the original model's loss, at `firmness` times `BARRIER_RATE`."""
    if not is_traced(settings["learning_rate"]) and settings["learning_rate"] == 0:
        raise ValueError("settings['learning_rate']: got 0, expected a number above 0, by which the barrier is divided")
    rate = firmness * BARRIER_RATE[settings.get("optimizer", "adam")] / settings["learning_rate"]
    return tolerances.budget(terms.retain_loss + settings["allowed_rise"], rate)


_PASSES = "1F 1B forget and retain, stacked"
_NEEDS = "forget and retain sets"
ALLOWED_RISE = LogUniform(0.005, 0.2)

STEP_METHOD = Method(
    eupmu_step,
    PAPER,
    _PASSES,
    _NEEDS,
    {"learning_rate": LEARNING_RATE, "forget_objective": FORGET_OBJECTIVE, "tolerance": LogUniform(0.001, 1.0)},
    family=FAMILY,
)
METHOD = Method(
    eupmu_explicit,
    PAPER,
    _PASSES,
    _NEEDS,
    {"learning_rate": LEARNING_RATE, "forget_objective": FORGET_OBJECTIVE, "allowed_rise": ALLOWED_RISE},
    family=FAMILY,
)
