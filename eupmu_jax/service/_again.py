"""Measures again what a run recorded as reached, from its parameters, and compares the figures."""

import json
import math
from typing import Any

import numpy as np

from eupmu_jax.benchmark.rows import finite
from eupmu_jax.methods.eupmu_level import UNLIMITED
from eupmu_jax.service import _judged, deletion
from eupmu_jax.service.ids import digest_of_ids
from eupmu_jax.training import levels
from eupmu_jax.training._aim import aim_of
from eupmu_jax.training._inputs import Sets
from eupmu_jax.training._reached import Reached, reached, within
from eupmu_jax.training._watch import retain_figures
from eupmu_jax.training._way import forget_error_of, steered

# Tolerances of figures that are computed again, possibly on another processor: relative, and absolute for rates;
# absolute for errors that are not rates, relative to the errors of the run, to allow for rounding only; and points of
# accuracy after relearning, whose steps accumulate differences in rounding.
TOLERANCE, ROUNDED, RELEARNED = 1e-3, 1e-6, 5.0
# Entries of a level that are measured on unseen examples.
OF_UNSEEN = ("target", "source", "unseen", "comparison", "interval")


def untrue(own: dict, asked: dict, told: dict, start: Any, end: Any, sets: tuple[Any, Any]) -> list[str]:
    """Returns what in `reached.json` does not follow from the parameters, the data and `asked.json`; empty if all does.

    Unseen examples added to the file after the run are not used. If the file no longer has those of the run, what was
    measured on them cannot be measured again, and is skipped.

    Args:
      own: The names of the user's file.
      asked, told: `asked.json` and `reached.json`.
      start, end: Initial and final parameters of the run.
      sets: The forget set and the retain set.
    """
    task, both = own["task"], Sets(*sets, None)
    held_out = None if asked["held_out"] is None else _judged.held_out_of(own)
    is_whole = (asked["held_out"] is None) == (held_out is None)
    aim = aim_of(task, start, both, held_out, None if is_whole else told["level"]["target"])
    before = retain_figures(task, start, both.retain, levels.chunk_of(task, start, both.retain))
    begun = forget_error_of(task, start, both.forget)
    settings = steered(task, deletion.settings_of(asked["limit"]), aim.target, begun)
    found = reached(task, end, start, both, held_out, aim, before, settings)
    # At the edge of a limit another processor may get the opposite result, so `kept` is checked against the record.
    others = {"kept"} if is_whole else {"kept", *OF_UNSEEN}
    compared = lambda level: {name: value for name, value in level.items() if name not in others}
    measured = json.loads(json.dumps(finite(deletion.as_dict(found))))
    wrong = differences("level", compared(told["level"]), compared(measured), absolute(task.is_rate, told["level"]))
    level = _level_of(told["level"])
    flags = {
        "level.kept": (told["level"]["kept"], within(level.retain_error, level.limit)),
        "rates": (told["rates"], task.is_rate),
        "examples": (told["examples"], {"forget": len(sets[0]), "retain": len(sets[1])}),
    }
    if is_whole:
        # A record without it was judged by a fixed share of the distance, which is never less strict.
        least = _judged.least_of_noise(task, start, end, level, sets[0]) if "least" in told else None
        wrong += differences("least", told.get("least"), least, absolute(task.is_rate, told["level"]))
        met, telling = _judged.judged(own, start, end, level, sets, told.get("least"))
        flags |= {"met": (told["met"], met), "telling": (told["telling"], telling)}
    wrong += [f"{name}: reported {said}, found {true}" for name, (said, true) in flags.items() if said != true]
    if digest_of_ids(np.array(asked["positions"], np.int64)) != asked["ids"]:
        wrong.append("ids: the positions do not match the hash")
    return wrong


def absolute(rates: bool, level: dict) -> float:
    """The absolute tolerance for recomputed figures that are close to 0."""
    errors = [level[name] for name in ("target", "start", "forget_error", "retain_error")]
    largest = max((abs(error) for error in errors if error is not None and error < UNLIMITED), default=1.0)
    return TOLERANCE if rates else ROUNDED * min(1.0, largest)


def _level_of(told: dict) -> Reached:
    """The `Reached` of a record, in which values that were not finite are None."""
    number = lambda value: np.nan if value is None else value
    made: dict[str, Any] = {name: number(value) for name, value in told.items()}
    kinds: dict[str, Any] = {"unseen": levels.Level, "comparison": levels.Comparison}
    for name, kind in kinds.items():
        given = told[name]
        made[name] = given and kind(**{key: number(value) for key, value in given.items()})
    return Reached(**made | {"interval": told["interval"]})


def differences(place: str, reported: Any, found: Any, tolerance: float = TOLERANCE) -> list[str]:
    """Lines that say where a record differs from what was measured again."""
    if place.endswith(".canaries") and None in (reported, found):
        return []
    tolerance = ROUNDED if place.endswith("p_value") else tolerance
    tolerance = RELEARNED if ".relearning." in place and place.endswith(".accuracy") else tolerance
    if isinstance(reported, dict) and isinstance(found, dict):
        lines = [f"{place}.{name}: is reported but not found" for name in reported if name not in found]
        lines += [f"{place}.{name}: is found but not reported" for name in found if name not in reported]
        shared = [name for name in reported if name in found]
        return lines + [
            line for name in shared for line in differences(f"{place}.{name}", reported[name], found[name], tolerance)
        ]
    if isinstance(reported, list) and isinstance(found, list) and len(reported) == len(found):
        pairs = enumerate(zip(reported, found, strict=True))
        return [line for index, pair in pairs for line in differences(f"{place}[{index}]", *pair, tolerance)]
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (reported, found))
    same = math.isclose(reported, found, rel_tol=TOLERANCE, abs_tol=tolerance) if numbers else reported == found
    shown = lambda value: f"{value:.6g}" if isinstance(value, float) else repr(value)
    return [] if same else [f"{place}: reported {shown(reported)}, found {shown(found)}"]
