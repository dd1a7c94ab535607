"""Checks of a run before any work: the method, whether the task has what it needs, the settings."""

import logging
from collections.abc import Mapping

import numpy as np

from eupmu_jax._stack.checks import check_number
from eupmu_jax.methods.method import (
    OBJECTIVES,
    OPTIMIZER_SETTINGS,
    OPTIMIZERS,
    Choice,
    Method,
    Settings,
    complete,
    middle_of,
)
from eupmu_jax.tasks import Task, check_task

logger = logging.getLogger("eupmu_jax")
# Settings that a method divides by, and settings that are shares.
POSITIVE = ("smoothing", "temperature", "damping")
SHARES = ("mask_fraction", "max_share", "sparsity")


def default_settings(method: Method, task: Task) -> dict:
    """The middle of the method's space, and the task's first forget loss.

    EUPMU has no `allowed_error` if the task's error is not a rate: it then depends on the target.

    >>> from eupmu_jax import methods, tasks
    >>> default_settings(methods.METHODS["weighted sum"], tasks.classification(lambda p, x: x @ p, 3))
    {'learning_rate': 0.00173, 'forget_objective': 'bounded_ascent', 'retain_weight': 3.0}
    """
    settings: dict = {}
    for name, dimension in method.space.items():
        if name == "forget_objective":
            settings[name] = next(iter(task.forget))
        elif isinstance(dimension, Choice) and name in OBJECTIVES:
            shared = [loss for loss in task.forget if loss in dimension.options]
            settings[name] = (shared or list(task.forget))[0]
        elif isinstance(dimension, Choice):
            settings[name] = dimension.options[len(dimension.options) // 2]
        else:
            settings[name] = middle_of(dimension)
    if method.steers and not task.is_rate:
        # How far an error of unknown unit may rise follows from its distance to the target.
        del settings["allowed_error"]
    return settings


def resolve_settings(name: str, method: Method, task: Task, settings: Settings | None) -> Settings:
    """The settings of a run: those given, or the defaults if None; for EUPMU, with defaults for the rest.

    A setting of the optimizer that the method does not read is accepted with a warning.

    Raises:
      ValueError: For a task that lacks what the method needs, a setting that the method does not read, a number that is
        negative, not finite or otherwise out of range, an unknown optimizer, a forget loss that the task lacks.

    >>> from eupmu_jax import methods, tasks
    >>> task = tasks.classification(lambda p, x: x @ p, 3)
    >>> dict(resolve_settings("EUPMU", methods.METHODS["EUPMU"], task, {"limit": 0.1}))
    {'learning_rate': 0.000562, 'forget_objective': 'bounded_ascent', 'limit': 0.1}
    """
    _check_requirements(name, method, task)
    if settings is None:
        return complete(default_settings(method, task))
    if not isinstance(settings, Mapping):
        raise ValueError(f"settings: got {type(settings).__name__}, expected a dict")
    known = (*method.space, *method.optional, *OPTIMIZER_SETTINGS)
    for key, value in settings.items():
        if key not in known:
            raise ValueError(f"settings: got {key!r}, which {name} does not read; expected any of {', '.join(known)}")
        if key in OBJECTIVES and (not isinstance(value, str) or value not in task.forget):
            raise ValueError(f"settings[{key!r}]: got {value!r}, expected one of {', '.join(task.forget)}")
        dimension = method.space.get(key)
        words = [word for word in getattr(dimension, "options", ()) if isinstance(word, str)]
        if words and key not in OBJECTIVES and value not in words:
            raise ValueError(f"settings[{key!r}]: got {value!r}, expected one of {', '.join(words)}")
        if key == "optimizer" and value not in OPTIMIZERS:
            raise ValueError(f"settings['optimizer']: got {value!r}, expected one of {', '.join(OPTIMIZERS)}")
        if not (words or key == "optimizer"):
            _check_range(key, value)
            if key in ("limit", "allowed_error") and task.is_rate and value > 1:
                raise ValueError(
                    f"settings[{key!r}]: got {value!r}, expected a share of at most 1; 0.01 is one point of accuracy"
                )
    if ignored := set(OPTIMIZER_SETTINGS) & set(settings) - {*method.space, *method.optimizer_settings}:
        logger.warning("settings: got %s, which %s ignores", ", ".join(sorted(ignored)), name)
    if not method.steers:
        return complete(settings)
    # A method that needs no tuning can be given a limit and nothing else.
    filled = default_settings(method, task)
    if {"limit", "allowed_rise"} & set(settings):
        # The given limits then take its place.
        filled.pop("allowed_error", None)
        if "allowed_error" in settings:
            raise ValueError("settings: got 'allowed_error' with 'limit' or 'allowed_rise', expected one kind of limit")
    return complete(filled | dict(settings))


def _check_range(key, value):
    if isinstance(value, bool | np.bool_):
        raise ValueError(f"settings[{key!r}]: got {value}, expected a number")
    bounds: dict = {"above": 0} if key in POSITIVE else {"least": 0}
    if key == "momentum":
        # Adam divides by 1 minus its powers.
        bounds["below"] = 1
    if key in SHARES:
        bounds["most"] = 1
    check_number(f"settings[{key!r}]", value, finite=True, **bounds)


def _check_requirements(name: str, method: Method, task: Task) -> None:
    """Raises `ValueError` that says what `task` lacks for this method, if anything."""
    check_task(task)
    for function in method.requires:
        if getattr(task, function) is None:
            raise ValueError(
                f"task.{function}: got None, but {name} needs it; expected a task that has it, or another method"
            )
    for loss in method.forget:
        if loss not in task.forget:
            raise ValueError(
                f"task.forget: got {', '.join(task.forget)}, but {name} needs a forget loss named {loss!r}; expected "
                "a task that has it, or another method"
            )
