"""The target of a run that steers to a level."""

import logging
from typing import NamedTuple

import chex
import jax
import numpy as np

from eupmu_jax._stack.programs import fetched
from eupmu_jax.methods.eupmu_level import UNLIMITED
from eupmu_jax.tasks import Task
from eupmu_jax.tasks.examples import ROUNDED, part_of
from eupmu_jax.training._inputs import Sets
from eupmu_jax.training._way import passes_of_start
from eupmu_jax.training.classes import FEW, are_labelled, classes_to_go, labels_of
from eupmu_jax.training.levels import (
    MOST,
    Level,
    batches_of,
    check_finite,
    check_losses,
    check_told,
    chunk_of,
    figures_of,
    level_of,
)

logger = logging.getLogger("eupmu_jax")
WIDE = 0.05


class Aim(NamedTuple):
    """A target of the forget error: its source, examples passed to find it, classes to be forgotten, its interval.

    `at_least`: whether the whole forget set belongs to such classes, so that the target is a lower bound of the error.
    """

    target: float
    source: str
    level: Level | None
    passes: int
    gone: frozenset = frozenset()
    interval: tuple[float, float] | None = None
    at_least: bool = False


def aim_of(task: Task, params: chex.ArrayTree, sets: Sets, held_out, given) -> Aim:
    """The given target, or the level of unseen data with the classes mixed as in the forget set.

    A class that the retain set lacks is to be forgotten: its level is 1, or `task.unknown` of its examples if the task
    has it. A class with fewer than 5 unseen examples gets the level of all of them. Without held-out data the target is
    `task.unknown` of the forget set if the task has it, else the error of chance.

    Raises:
      ValueError: For a target that is not a possible error, or errors of the original model that are not finite.
    """
    if given is not None:
        return _given(task, sets, given)
    if held_out is not None:
        return _of_unseen(task, params, sets, held_out)
    return (_of_chance if task.unknown is None else _of_unknown)(task, params, sets)


def _given(task, sets, target):
    most = 1 if task.is_rate else np.inf
    if not 0 <= target <= most:
        wanted = "an error rate from 0 to 1" if task.is_rate else "a number >= 0"
        raise ValueError(f"settings['target']: got {target}, expected {wanted}")
    return Aim(float(target), "settings", None, 0, classes_to_go(task, sets.forget, sets.retain))


def _of_unknown(task, params, sets):
    level, passes = _unknown_level(task, params, sets.forget)
    labels = labels_of(task, sets.forget)
    stay = () if labels is None else set(labels.tolist()) - classes_to_go(task, sets.forget, sets.retain)
    if stay:
        logger.warning(
            "held_out: got None, so the error on unseen data is not known; the target is %.3g, the error of a model "
            "that does not know the conditions of the forget set, although the retain set has some of them",
            level.error,
        )
    return Aim(level.error, "unknown", None, passes, at_least=labels is not None and not stay)


def _of_chance(task, params, sets):
    gone = classes_to_go(task, sets.forget, sets.retain)
    target = _chance(task, params, sets.forget, gone)
    aimed = f"to the error of chance, {target:.3g}" + ", with 1 for classes that the retain set lacks" * bool(gone)
    logger.warning(
        "held_out: got None, so the error on unseen data is not known; the forget error is raised %s, as far as the "
        "limit allows",
        "without a target" if target == UNLIMITED else aimed,
    )
    passes = 0 if task.is_rate or task.error is None else min(len(sets.forget), MOST)
    return Aim(target, "chance", None, passes, gone)


def _of_unseen(task, params, sets, held_out):
    errors, losses = figures_of(task, params, held_out)
    check_losses("held_out", losses)
    level = check_finite(level_of(errors))
    _check_unseen(task, errors, losses)
    forgotten, unseen = labels_of(task, sets.forget), labels_of(task, held_out)
    if forgotten is not None and unseen is not None and are_labelled(task, sets.retain):
        return _by_class(task, params, sets, forgotten, unseen, errors, level)
    _warn_of_few(task, level)
    return Aim(level.error, "unseen data", level, len(errors), interval=(level.low, level.high))


def _check_unseen(task, errors, losses):
    """Raises `ValueError` for errors of held-out examples that define no level; warns of losses that tell nothing."""
    _check_rate(task, "held-out examples", errors)
    if (mean := float(np.mean(errors))) < 0:
        raise ValueError(
            f"task.error: held-out examples have a mean of {mean:.3g}, but EUPMU steers an error that is never "
            "negative; expected such an error in the task, or EUPMU budget"
        )
    if not task.is_rate and len(errors) > 1 and np.ptp(errors) == 0:
        logger.warning(
            "held_out: all %d examples have the same error, %.3g; a loss that compares the examples of a batch says "
            "nothing about a single one: give the task an error of each example",
            len(errors),
            errors[0],
        )
    elif task.num_classes is None and len(losses) > 1 and (losses == losses[0]).all():
        logger.warning(
            "held_out: all %d examples, each measured alone, have the same loss, %.3g; a loss that compares the "
            "examples of a batch cannot tell forgotten from unseen ones, and an error that does so depends on how many "
            "are measured at once: let each example hold what it is compared with, such as negatives of its own",
            len(losses),
            losses[0] + 0.0,  # without the sign of -0.0
        )


def _check_rate(task, whose, errors):
    """Raises `ValueError` for errors that are not from 0 to 1 where the task says that they are rates."""
    # Up to rounding: 1 - cosine, for one, may be slightly negative.
    if task.is_rate and (errors.min() < 1 - ROUNDED or errors.max() > ROUNDED):
        declared = "task.rate: is True" if task.rate else f"task.num_classes: is {task.num_classes}"
        raise ValueError(
            f"{declared}, but {whose} have errors from {errors.min():.3g} to {errors.max():.3g}; expected a rate from "
            "0 to 1, or a task without it"
        )


def checked_start(task: Task, params: chex.ArrayTree, forget, is_compared: bool) -> float:
    """`forget_error_of`, from a single pass that also checks the examples to forget.

    Raises:
      ValueError: For errors that are not the rates that the task says they are, or a mean that is NaN along with some
        loss. A loss that divides by weights or masks may be finite for every batch and NaN for an example without any,
        which could not be compared with unseen data; that is refused too if `is_compared`. Tasks that have a check
        rely on it.
    """
    if not passes_of_start(task, forget):
        return 0.0
    errors, losses = figures_of(task, params, forget, MOST)
    _check_rate(task, "examples to forget", errors)
    alone = losses if is_compared and task.check is None else ()
    check_told("forget", task, params, forget, float(np.mean(errors)), *alone)
    return 0.0 if task.is_rate else float(np.mean(errors))


def _by_class(task, params, sets, forgotten, unseen, errors, level):
    """The level of unseen data with the given errors and classes, mixed by class as in the forget set."""
    found, counts = np.unique(forgotten, return_counts=True)
    gone, passes = classes_to_go(task, sets.forget, sets.retain), len(errors)
    levels = {c: level_of(errors[unseen == c]) for c in found.tolist() if c not in gone and np.sum(unseen == c) >= FEW}
    lost = Level(1.0, 1.0, 1.0, 0)
    if gone and task.unknown is not None:
        to_go = np.isin(forgotten, list(gone))
        lost, more = _unknown_level(task, params, part_of(sets.forget, np.flatnonzero(to_go)))
        passes += more
    if few := set(found.tolist()) - set(levels) - gone:
        logger.warning(
            "held_out: got fewer than %d examples of %d of the %d classes in the forget set, whose level is taken to "
            "be that of all held-out examples, %.3g",
            FEW,
            len(few),
            len(found),
            level.error,
        )
    sizes = dict(zip(found.tolist(), counts.tolist(), strict=True))
    parts = [(lost if c in gone else levels[c], size) for c, size in sizes.items() if c not in few]
    if few:
        # One part of the mix, as these classes share one estimate and its error.
        parts.append((level, sum(sizes[c] for c in few)))
    mixed = _mixed(parts, len(errors))
    all_go = task.unknown is not None and not set(sizes) - gone
    if all_go:
        # No unseen example has a part in the level.
        return Aim(mixed.error, "unknown", level, passes, gone, at_least=True)
    _warn_of_few(task, mixed)
    return Aim(mixed.error, "unseen data by class", level, passes, gone, (mixed.low, mixed.high))


def _mixed(parts, examples):
    """The level of a mix of classes, given as `(level, size)`, with the interval of Zou and Donner (2008)."""
    levels, counts = zip(*parts, strict=True)
    shares = np.array(counts) / np.sum(counts)
    errors, lows, highs = (np.array([getattr(level, name) for level in levels]) for name in ("error", "low", "high"))
    width = lambda ends: float(np.sqrt(np.sum((shares * (ends - errors)) ** 2)))
    error = float(np.average(errors, weights=counts))
    return Level(error, error - width(lows), error + width(highs), examples)


def _warn_of_few(task, level):
    # Relative to the level if that is not a rate.
    wide = 2 * WIDE * (1.0 if task.is_rate else abs(level.error))
    if level.high - level.low > wide and task.error is not None:
        logger.warning(
            "held_out: got %d examples, whose error of %.3g may be anything from %.3g to %.3g; more examples would "
            "narrow this interval",
            level.examples,
            level.error,
            level.low,
            level.high,
        )


def _chance(task, params, forget, gone):
    """The error of chance: that of a classifier, 1 for other rates and errors of 0 or 1, and unknown for the rest."""
    if task.num_classes is not None:
        # No example of a class to be forgotten should be recognised.
        labels = labels_of(task, forget)
        share = 0 if labels is None else float(np.mean(np.isin(labels, list(gone))))
        return 1 - (1 - share) / task.num_classes
    # Small errors on what a model learned say nothing about their unit, so a mean below 1 does not make a rate.
    of_forget = lambda: figures_of(task, params, forget, MOST)[0]
    known = task.is_rate or (task.error is not None and np.isin(of_forget(), (0, 1)).all())
    return 1.0 if known else UNLIMITED


def _unknown_level(task, params, forget):
    errors, passes = unknown_errors(task, params, forget)
    return level_of(errors), passes


def unknown_errors(task: Task, params: chex.ArrayTree, forget) -> tuple[np.ndarray, int]:
    """`task.unknown` of the examples whose error `figures_of` gives, on the same noise: `(n,)`, and examples passed.

    Raises:
      ValueError: For errors that are not finite.
    """
    assert task.unknown is not None
    run = jax.jit(task.unknown)
    parts = [run(params, batch) for batch in batches_of(forget, MOST, chunk_of(task, params, forget))]
    errors = np.concatenate([np.asarray(fetched(part), np.float64) for part, _ in parts])
    if not np.isfinite(errors).all():
        raise ValueError("forget: got errors of `task.unknown` that are not finite, expected those of a trained model")
    return errors, int(parts[0][1]) * len(errors)
