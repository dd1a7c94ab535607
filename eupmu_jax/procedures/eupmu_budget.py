"""EUPMU under a budget for the whole run, with a measured end."""

import functools

import jax

from eupmu_jax import controllers, objectives, tolerances
from eupmu_jax.feasibility import furthest_feasible
from eupmu_jax.implicit import implicit_surgery
from eupmu_jax.procedures.eupmu_explicit import ALLOWED_RISE, PAPER
from eupmu_jax.procedures.eupmu_implicit import implicit_descent
from eupmu_jax.procedures.procedure import FORGET_OBJECTIVE, LEARNING_RATE, Method, Procedure

# How much of the retain set the end is measured on, and how often.
MEASURED = 5_000
BISECTIONS = 4


def eupmu_budget(problem, settings) -> Procedure:
    """A PI controller on the level of the retain loss, which may rise by `allowed_rise` nats in all.

    The last parameters are measured on the retain set, or on its first 5,000 examples, and where they exceed the limit
    led back towards the original ones until they keep it (`furthest_feasible`).
    """
    limit = problem.retain_loss + settings["allowed_rise"]
    unit = 1 / settings["allowed_rise"]  # moves the multiplier by 1 for a violation as large as the whole budget
    surgery = implicit_surgery(
        tolerances.budget(limit, 1.0), controllers.nu_pi(unit, 0.1 * unit), proxy="level", initial_multiplier=1.0
    )
    descent = implicit_descent(problem, settings, surgery, (1, 1))

    def finish(params, prepared, forget, retain):
        sample = jax.tree.map(lambda leaf: leaf[:MEASURED], retain)
        return _search(problem.apply, sample, limit, prepared, params)

    cost = descent.cost._replace(outside_forward=min(MEASURED, problem.num_retain) * (BISECTIONS + 1))
    return descent._replace(cost=cost, prepare=lambda params, forget, retain, key: params, finish=finish)


def _retain_loss(apply, retain, params):
    return objectives.cross_entropy(apply(params, retain["images"]), retain["labels"])


@functools.partial(jax.jit, static_argnums=0)
def _search(apply, retain, limit, inside, outside):
    measure = functools.partial(_retain_loss, apply, retain)
    return furthest_feasible(measure, limit, inside, outside, BISECTIONS)


METHOD = Method(
    eupmu_budget,
    PAPER + ", with a budget",
    f"1F 1B forget and retain, {BISECTIONS + 1} F of {MEASURED:,} retained examples at the end",
    "forget and retain set",
    {"learning_rate": LEARNING_RATE, "forget_objective": FORGET_OBJECTIVE, "allowed_rise": ALLOWED_RISE},
)
