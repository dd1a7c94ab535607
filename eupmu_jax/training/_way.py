"""The distance from the original model's forget error to a target: its start, and the default limit that follows."""

from collections.abc import Mapping

import chex

from eupmu_jax.methods.eupmu_level import ALLOWED_ERROR, UNLIMITED, WAY, unit_of
from eupmu_jax.methods.method import Settings, complete, middle_of
from eupmu_jax.tasks import Task
from eupmu_jax.training.levels import MOST, measured_level

# Settings that limit the retain set; any one is enough.
LIMITS = frozenset({"allowed_error", "limit", "allowed_rise"})


def forget_error_of(task: Task, params: chex.ArrayTree, forget) -> float:
    """The forget error at the start, on at most 2,000 examples; 0 for rates, which need none."""
    return 0.0 if task.is_rate else measured_level(task, params, forget, MOST).error


def passes_of_start(task: Task, forget) -> int:
    """The number of examples passed to measure the forget error at the start, or to check a task's own rates."""
    return 0 if task.is_rate and task.check is not None else min(len(forget), MOST)


def steered(task: Task, settings: Settings, target: float, forget_error: float) -> Settings:
    """Settings with a target, and if they have no limit with the default one, in the unit in which errors count."""
    found = {**settings, "target": target}
    if not LIMITS & set(settings):
        # The true distance, as the minimum distance that the gains assume may be longer.
        way = (target - forget_error) / WAY if not task.is_rate and forget_error < target < UNLIMITED else None
        found["allowed_error"] = float(middle_of(ALLOWED_ERROR) * (way or unit_of(task, target, forget_error)))
    return complete(found)


def halfway(target: float, start: Mapping[str, float]) -> float:
    """The error halfway from the original model's forget error (0 for a rate) to the target, or a target below it."""
    begun = start.get("forget_error", 0.0)
    return min(begun + (target - begun) / 2, target)
