"""Whether a run that steers to a level reached it."""

from typing import NamedTuple

import numpy as np

from eupmu_jax.methods.eupmu_level import error_limit
from eupmu_jax.training._aim import Aim
from eupmu_jax.training._inputs import Sets
from eupmu_jax.training.classes import alike
from eupmu_jax.training.levels import MOST, Comparison, Level, compare, figures_of, measured_level


class Reached(NamedTuple):
    """The target of a run, and what it reached.

    Attributes:
      target: The mean error to which the forget set was to be brought; 1e30 if no level is known.
      source: Source of the target: "settings"; "unseen data" or "unseen data by class"; "unknown" if the task has
        `unknown` and there is no held-out data, or only conditions to be forgotten; else "chance".
      unseen: The original model's level on held-out data, with its interval; None if it was not measured.
      forget_error: Error of the returned parameters on the forget set, on at most 2,000 examples.
      retain_error: Their error on the whole retain set; for a task without classes, on at most 2,000 examples.
      start: The original model's error on the same retain examples.
      limit: The highest allowed retain error: the absolute limit, or the start plus the allowed rise; else infinity.
      kept: Whether the retain error is within the limit, and with `allowed_rise` the retain loss too.
      comparison: Comparison of forgotten and unseen examples under the returned parameters. For a classifier both have
        the same mix of classes, of those that unseen data has too, without the classes to be forgotten. None without
        held-out data or if no such class is left.
      interval: The 95 % interval of a target that was measured on held-out data; else None. For a mix of classes with
        few unseen examples each, its lower end is too high in up to an eighth of cases, rather than in 2.5 %.
    """

    target: float
    source: str
    unseen: Level | None
    forget_error: float
    retain_error: float
    start: float
    limit: float
    kept: bool
    comparison: Comparison | None
    interval: tuple[float, float] | None = None


def reached(task, params, original, sets: Sets, held_out, aim: Aim, start, settings) -> Reached:
    """Measures whether the aim was reached, and at what cost to the retain set."""
    forget, most = measured_level(task, params, sets.forget, MOST), None
    before, loss = start["retain_error"], start.get("retain_loss")
    if task.num_classes is None:
        # Both on the same examples and noise, or the effect of noise could outweigh the rise.
        most = MOST
        before, loss = _means(figures_of(task, original, sets.retain, most))
    retain, retain_loss = _means(figures_of(task, params, sets.retain, most))
    found = error_limit(before, settings)
    limit = np.inf if found is None else float(found)
    both = None if held_out is None else alike(task, sets.forget, held_out, aim.gone)
    comparison = None if both is None else compare(task, params, *both)
    kept = within(retain, limit)
    if "allowed_rise" in settings:
        kept &= within(retain_loss, loss + settings["allowed_rise"])
    errors = forget.error, retain, before
    return Reached(aim.target, aim.source, aim.level, *errors, limit, kept, comparison, aim.interval)


def _means(figures):
    return tuple(float(np.mean(each)) for each in figures)


def within(figure: float, limit: float) -> bool:
    """Whether a figure is within its limit, up to rounding."""
    return bool(figure <= limit + 1e-6 * abs(limit))
