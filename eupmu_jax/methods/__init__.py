"""Unlearning methods, one file each, under one contract, on any task. `METHODS` is the one table of them."""

from eupmu_jax.methods import (
    aggregated,
    augmented_lagrangian,
    bad_teacher,
    boundary_expand,
    boundary_shrink,
    eupmu_budget,
    eupmu_explicit,
    eupmu_implicit,
    eupmu_level,
    eupmu_transport,
    fine_tuning,
    gradient_ascent,
    influence,
    l1_sparse,
    ofmu,
    quadratic_penalty,
    random_labels,
    salun,
    salun_soft,
    scrub,
    weighted_sum,
    zeroth_order,
)
from eupmu_jax.methods._resolve import default_settings, resolve_settings
from eupmu_jax.methods.method import (
    Choice,
    Cost,
    LogUniform,
    Method,
    Procedure,
    Settings,
    Terms,
    complete,
    loss_of,
)

METHODS: dict[str, Method] = {
    "EUPMU": eupmu_level.METHOD,
    "fine-tuning": fine_tuning.METHOD,
    "gradient ascent": gradient_ascent.METHOD,
    "random labels": random_labels.METHOD,
    "weighted sum": weighted_sum.METHOD,
    "SCRUB": scrub.METHOD,
    "Bad Teacher": bad_teacher.METHOD,
    "boundary shrink": boundary_shrink.METHOD,
    "boundary expand": boundary_expand.METHOD,
    "OFMU": ofmu.METHOD,
    "SalUn": salun.METHOD,
    "SalUn-soft": salun_soft.METHOD,
    "l1-sparse": l1_sparse.METHOD,
    "influence": influence.METHOD,
    "augmented Lagrangian": augmented_lagrangian.METHOD,
    "quadratic penalty": quadratic_penalty.METHOD,
    "ZO-signGD": zeroth_order.METHOD,
    **aggregated.METHODS,
    "EUPMU step": eupmu_explicit.STEP_METHOD,
    "EUPMU explicit": eupmu_explicit.METHOD,
    "EUPMU implicit": eupmu_implicit.METHOD,
    "EUPMU next-batch": eupmu_implicit.NEXT_BATCH_METHOD,
    "EUPMU budget": eupmu_budget.METHOD,
    "EUPMU transport": eupmu_transport.METHOD,
}


def method(name: str) -> Method:
    """The method of that name; raises `ValueError` that lists the known ones if there is none.

    >>> method("EUPMU").needs
    'forget, retain and held-out sets'
    """
    if name not in METHODS:
        raise ValueError(f"method: got {name!r}, expected one of {', '.join(METHODS)}")
    return METHODS[name]


__all__ = [
    "METHODS",
    "Choice",
    "Cost",
    "LogUniform",
    "Method",
    "Procedure",
    "Settings",
    "Terms",
    "complete",
    "default_settings",
    "loss_of",
    "method",
    "resolve_settings",
]
