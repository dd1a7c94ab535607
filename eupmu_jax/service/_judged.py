"""Judges whether a run met its aim, and whether examples forgotten by earlier runs are known again."""

from collections.abc import Mapping, Sequence
from typing import Any

import chex
import numpy as np

from eupmu_jax.methods.eupmu_level import UNLIMITED
from eupmu_jax.tasks import Task, as_examples
from eupmu_jax.tasks.examples import part_of
from eupmu_jax.training import levels
from eupmu_jax.training._aim import unknown_errors
from eupmu_jax.training._reached import Reached
from eupmu_jax.training.classes import alike, classes_to_go

# Shares of the distance from the start to a target: what may always be missing, and what noise may excuse at most.
SHORT, NOISY = 0.01, 0.1


def judged(
    own: Mapping[str, Any], start, end, level: Reached, sets: tuple[Any, Any], noisy: float | None = None
) -> tuple[bool, bool]:
    """Whether a run met its aim, and whether the errors of the original model told the forgotten examples apart.

    Args:
      own: The names of the user's file.
      start, end: Initial and final parameters of the run.
      level: What the run reached.
      sets: The forget set and the retain set.
      noisy: What `least_of_noise` returns for the run; None also for a record without it.
    """
    task, (forget, retain), compared = own["task"], sets, level.comparison
    # Forgotten too little or too much, compared with unseen data if there is any. A class to be forgotten is not
    # compared with unseen data, so a set that has one is checked against its target too.
    if (least := noisy) is None:
        begun = None if task.is_rate else levels.measured_level(task, start, forget, levels.MOST).error
        least = least_of(level.target, begun)
    # An error that is NaN reaches nothing.
    missed = not level.forget_error >= least if compared is None else not compared.low <= 0 <= compared.high
    # If no level is known, none is reached.
    missed |= level.target >= UNLIMITED
    telling = True
    if compared is not None:
        gone = classes_to_go(task, forget, retain)
        missed |= bool(gone) and levels.measured_level(task, end, forget, levels.MOST).high < least
        both = alike(task, forget, held_out_of(own), gone)
        assert both is not None
        before = levels.compare(task, start, *both)
        telling = bool(gone) or not before.low <= 0 <= before.high
    return bool(level.kept and not missed), telling


def least_of_noise(task: Task, start, end, level: Reached, forget: Any) -> float | None:
    r"""The least error that counts as that of chance, or of a model without knowledge; None for another target.

    A model that ends at such a target has an error that varies around it with the examples and their noise, so half of
    such runs would be said to have missed it. With n examples a run may therefore fall short by

    .. math:: \max(s, \min(0.1\, w, \delta)), \qquad
      \delta_{chance} = 1.96 \sqrt{\ell^* (1 - \ell^*) / n}, \quad
      \delta_{unknown} = t_{n-1}\, \mathrm{sd}(e - u) / \sqrt n

    with w the distance from the start to the target, s what `least_of` allows, :math:`e_i` the error of example i at
    the end, :math:`u_i` its error by `task.unknown` on the same noise, and t the 97.5 % quantile of Student's
    distribution. A run that ends at its target is then said to have missed it in about 2.5 % of cases, or in more where
    :math:`\delta` exceeds a tenth of the distance. Noise excuses no more than that, or a run on a few examples could
    reach its target without doing anything.
    """
    target, known = level.target, level.comparison is None
    by_chance = known and level.source == "chance" and target < 1
    if not by_chance and not (known and level.source == "unknown" and not task.is_rate):
        return None
    errors = lambda params: levels.figures_of(task, params, forget, levels.MOST)[0]
    begun, count = float(np.mean(errors(start))), min(len(forget), levels.MOST)
    if by_chance:
        width = float(1.96 * np.sqrt(target * (1 - target) / count))
    else:
        apart = levels.level_of(errors(end) - unknown_errors(task, start, forget)[0])
        width = apart.error - apart.low
    lowest = target - NOISY * max(target - begun, 0)
    # In this order, as a width that is NaN must not become the result.
    return min(least_of(target, None if task.is_rate else begun), max(lowest, target - width))


def returned(task: Task, params: chex.ArrayTree, data: Any, earlier: list[dict]) -> list[int]:
    """Numbers of the earlier runs, counted from 1, whose examples are known again."""
    known = lambda run: levels.measured_level(task, params, part_of(data, np.array(run["positions"])), levels.MOST).high
    begun = None if task.is_rate else 0.0
    return [n for n, run in enumerate(earlier, 1) if known(run) < least_of(run["target"], begun, run.get("interval"))]


def least_of(target: float, begun: float | None = None, interval: Sequence[float | None] | None = None) -> float:
    """The least error that counts as reaching a target: a point below it, or 1 % of the distance if it is not a rate.

    Args:
      target: Target of the error.
      begun: The error at the start, if it is not a rate; 0 if unknown, None for a rate.
      interval: The interval of a target that was measured on unseen examples, as their error is its uncertainty.
    """
    if target >= UNLIMITED:
        return 0.0
    least = target - (0.01 if begun is None else SHORT * max(target - begun, 0))
    return least if not interval or interval[0] is None else min(least, interval[0])


def held_out_of(own: Mapping[str, Any]) -> Any:
    """The held-out examples of a user's file, or None."""
    return None if own.get("held_out") is None else as_examples("held_out", own["held_out"])
