"""EUPMU under a budget for the whole run, with a measured end."""

import functools

import jax

from eupmu_jax import objectives
from eupmu_jax.feasibility import furthest_feasible
from eupmu_jax.procedures.eupmu_explicit import ALLOWED_RISE, PAPER, eupmu_explicit
from eupmu_jax.procedures.procedure import FORGET_OBJECTIVE, LEARNING_RATE, Method, Procedure

# How much of the retain set the end is measured on, and how often. A whole small set would cost more than the steps.
SHARE = 6
MEASURED = 5_000
BISECTIONS = 4


def eupmu_budget(problem, settings) -> Procedure:
    """`eupmu_explicit`, whose last parameters are measured on a sixth of the retain set, 5,000 examples at most.

    Where they exceed the limit, the original loss plus `allowed_rise`, they are led back towards the original ones
    until they keep it (`furthest_feasible`). The barrier reads minibatches and holds to first order, so a learning rate
    that is too large takes it over its limit; the end does not depend on that.
    """
    explicit = eupmu_explicit(problem, settings)
    limit = problem.retain_loss + settings["allowed_rise"]
    measured = min(MEASURED, -(-problem.num_retain // SHARE))

    def finish(params, prepared, forget, retain):
        # Spread over the set, which may be sorted by class.
        sample = jax.tree.map(lambda leaf: leaf[:: problem.num_retain // measured][:measured], retain)
        return _search(problem.apply, sample, limit, prepared, params)

    cost = explicit.cost._replace(outside_forward=measured * (BISECTIONS + 1))
    return explicit._replace(cost=cost, prepare=lambda params, forget, retain, key: params, finish=finish)


@functools.partial(jax.jit, static_argnums=0)
def _search(apply, retain, limit, inside, outside):
    def measure(params):
        return objectives.cross_entropy(apply(params, retain["images"]), retain["labels"])

    return furthest_feasible(measure, limit, inside, outside, BISECTIONS)


METHOD = Method(
    eupmu_budget,
    PAPER + ", with a budget",
    f"1F 1B forget and retain, {BISECTIONS + 1}F of a sixth of the retain set after, {MEASURED:,} examples at most",
    "forget and retain set",
    {"learning_rate": LEARNING_RATE, "forget_objective": FORGET_OBJECTIVE, "allowed_rise": ALLOWED_RISE},
)
