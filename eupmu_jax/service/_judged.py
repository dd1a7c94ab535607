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
    begun = None if task.is_rate else levels.measured_level(task, start, forget, levels.MOST).error
    least = least_of(level.target, begun) if noisy is None else noisy
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
    r"""The least error that counts as that of a model without knowledge of the condition; None for another target.

    Example i has the error :math:`e_i` at the end of the run, and :math:`u_i` by `task.unknown`, on the same noise. The
    target is the mean of the latter. On other examples and noise the difference of the means would vary, and a run that
    ends at its target would end below it in half of the cases. So with n examples a run may fall short by

    .. math:: \max(0.01\, w, \min(0.1\, w,\; t_{n-1}\, \mathrm{sd}(e - u) / \sqrt n))

    with w the distance from the start to the target and t the 97.5 % quantile of Student's distribution. A run that
    ends at its target is then said to have missed it in about 2.5 % of cases, or in more where noise exceeds a tenth of
    the distance, which no noise excuses: else a few examples would excuse a run that did nothing.
    """
    if task.unknown is None or task.is_rate or level.source != "unknown" or level.comparison is not None:
        return None
    of = lambda params: levels.figures_of(task, params, forget, levels.MOST)[0]
    begun, width = float(np.mean(of(start))), levels.width_of(of(end) - unknown_errors(task, start, forget)[0])
    lowest = level.target - NOISY * max(level.target - begun, 0)
    # In this order, as a width that is NaN must not become the result.
    return min(least_of(level.target, begun), max(lowest, level.target - width))


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
