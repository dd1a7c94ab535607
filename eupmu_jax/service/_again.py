"""What a run says that it reached, measured again on its parameters, and figures compared with those found again."""

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

# Of figures that are computed again, on another processor too: relative, and of rates absolute; of errors that are no
# rates only what rounds to nothing beside the errors of a run; and points of accuracy after relearning, whose steps add
# up what the processors round differently.
TOLERANCE, ROUNDED, RELEARNED = 1e-3, 1e-6, 5.0
# What of a level is measured on unseen examples.
OF_UNSEEN = ("target", "source", "unseen", "comparison", "interval")


def untrue(own: dict, asked: dict, told: dict, start: Any, end: Any, sets: tuple[Any, Any]) -> list[str]:
    """What of `reached.json` does not follow from the parameters, the data and what was asked; nothing if all does.

    Unseen examples that the file has got since the run have no part in it. Where it has lost those of the run, what was
    measured on them cannot be measured again, and is left out.

    Args:
      own: Of the user's file.
      asked, told: `asked.json` and `reached.json`.
      start, end: Parameters of the run.
      sets: What was forgotten and what was retained.
    """
    task, both = own["task"], Sets(*sets, None)
    held_out = None if asked["held_out"] is None else _judged.held_out_of(own)
    is_whole = (asked["held_out"] is None) == (held_out is None)
    aim = aim_of(task, start, both, held_out, None if is_whole else told["level"]["target"])
    before = retain_figures(task, start, both.retain, levels.chunk_of(task, start, both.retain))
    begun = forget_error_of(task, start, both.forget)
    settings = steered(task, deletion.settings_of(asked["limit"]), aim.target, begun)
    found = reached(task, end, start, both, held_out, aim, before, settings)
    # On the edge of a limit another processor may fall to its other side: what was kept follows from what was told.
    others = {"kept"} if is_whole else {"kept", *OF_UNSEEN}
    compared = lambda level: {name: value for name, value in level.items() if name not in others}
    measured = json.loads(json.dumps(finite(deletion.as_dict(found))))
    wrong = differences("level", compared(told["level"]), compared(measured), absolute(task.is_rate, told["level"]))
    level = _level_of(told["level"])
    flags = {
        "level.kept": (told["level"]["kept"], within(level.retain_error, level.limit)),
        "examples": (told["examples"], {"forget": len(sets[0]), "retain": len(sets[1])}),
    }
    if is_whole:
        met, telling = _judged.judged(own, start, end, level, sets)
        flags |= {"met": (told["met"], met), "telling": (told["telling"], telling)}
    wrong += [f"{name}: reported {said}, found {true}" for name, (said, true) in flags.items() if said != true]
    if digest_of_ids(np.array(asked["positions"], np.int64)) != asked["ids"]:
        wrong.append("ids: the positions are not those of the hash")
    return wrong


def absolute(rates: bool, level: dict) -> float:
    """What figures that are computed again may differ by where they are next to nothing."""
    errors = [level[name] for name in ("target", "start", "forget_error", "retain_error")]
    largest = max((abs(error) for error in errors if error is not None and error < UNLIMITED), default=1.0)
    return TOLERANCE if rates else ROUNDED * min(1.0, largest)


def _level_of(told: dict) -> Reached:
    """A record as what it was made of; what was not finite is None in it."""
    number = lambda value: np.nan if value is None else value
    made: dict[str, Any] = {name: number(value) for name, value in told.items()}
    kinds: dict[str, Any] = {"unseen": levels.Level, "comparison": levels.Comparison}
    for name, kind in kinds.items():
        given = told[name]
        made[name] = given and kind(**{key: number(value) for key, value in given.items()})
    return Reached(**made | {"interval": told["interval"]})


def differences(place: str, reported: Any, found: Any, tolerance: float = TOLERANCE) -> list[str]:
    """Lines that say where a record differs from what was found again."""
    if place.endswith(".canaries") and None in (reported, found):
        return []
    tolerance = ROUNDED if place.endswith("p_value") else tolerance
    tolerance = RELEARNED if ".relearning." in place and place.endswith(".accuracy") else tolerance
    if isinstance(reported, dict) and isinstance(found, dict):
        lines = [f"{place}.{name}: is reported and not found" for name in reported if name not in found]
        lines += [f"{place}.{name}: is found and not reported" for name in found if name not in reported]
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
