"""Unlearns some of a user's data: writes the parameters to a folder, with records of what was asked and reached."""

import logging
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import numpy as np

from eupmu_jax.benchmark.rows import provenance
from eupmu_jax.service import folder, records, user_file
from eupmu_jax.service._judged import judged, least_of_noise, returned
from eupmu_jax.service.ids import NAMED, digest_of_ids
from eupmu_jax.tasks import Task, as_examples, check_task
from eupmu_jax.tasks.examples import part_of
from eupmu_jax.training import checkpoints
from eupmu_jax.training._alone import alone
from eupmu_jax.training._digest import digest
from eupmu_jax.training._faults import check_readable, make_folder
from eupmu_jax.training._inputs import check_counts, check_params
from eupmu_jax.training._reached import Reached
from eupmu_jax.training.classes import classes_to_go
from eupmu_jax.training.unlearning import unlearn

logger = logging.getLogger("eupmu_jax")
METHOD = "EUPMU"
NEEDED = ("task", "params", "data")


class Asked(NamedTuple):
    """The settings that identify a run.

    Attributes:
      limit: Percentage points by which the error on the retain set may rise; None means 1. If the error is not a rate,
        the unit is 0.01 of the error itself: 1 allows a diffusion model's loss to rise by 0.01, however large that loss
        is, and None means the default of `unlearn`.
      steps, seed, forget_batch, retain_batch: As in `unlearn`.
    """

    limit: float | None = None
    steps: int = 300
    seed: int = 0
    forget_batch: int = 64
    retain_batch: int = 192


def run(
    own: Mapping[str, Any],
    ids: np.ndarray,
    out: Path,
    asked: Asked,
    command: str,
    after: Path | None = None,
    on_step: Callable = lambda: None,
) -> dict:
    """Unlearns examples of a user's data, or resumes an interrupted call with the same arguments.

    Args:
      own: `task`, `params`, `data`, and optionally `held_out`, `frozen` and `mesh`, as in `unlearn`, from
        `user_file.load`.
      ids: Positions in the data, as `read_ids` returns them.
      out: Folder of the run.
      asked: See `Asked`.
      command: The command line, for the record.
      after: Folder of a finished run on the same data. The new run starts from its parameters, from which the limit
        counts too, and no longer retains what that run and those before it forgot.
      on_step: Called after each step.

    Returns:
      The content of `reached.json`: `figures` and `history` of `unlearn`, `level` with the target, the errors and the
      limit, `met` (whether the level was reached and not exceeded, and the limit kept), `least` (the least error that
      counts as reaching it, if noise decides that), `rates` (whether errors are rates), digests, versions and device.

    Raises:
      ValueError: For a folder of another run (the message says what differs) or one that cannot be made, a finished run
        without its parameters, positions of all examples or of some that were already forgotten, a run in `after` that
        is not finished or is on other data, another process that uses the folder, or numbers out of range.
      InterruptedError: If SIGTERM ended the run; repeat the call to resume.
    """
    check_task(own["task"])
    check_params(own["params"], own.get("frozen"))
    asked = limited(asked, own["task"])
    data = as_examples("data", own["data"])
    user_file.groups_of(own, data, np.empty(0, int))
    check_readable("out", out)
    data_digest = user_file.data_digest(data)
    params, earlier = beginning(own, data_digest, len(data), ids, after)
    record = asked._asdict() | {
        "method": METHOD,
        "data": data_digest,
        "ids": digest_of_ids(ids),
        "positions": ids.tolist(),
        "params": digest(params),
        "earlier": earlier,
        "held_out": None if own.get("held_out") is None else user_file.data_digest(own["held_out"], "held_out"),
    }
    origin = {"code": folder.code_of(own.get("__file__"))} | provenance(command)
    make_folder("out", out)
    folder.check_same(out, record)
    if (out / "reached.json").exists():
        reached = records.read(out / "reached.json", "reached")
        if folder.is_of_other_code(own.get("__file__"), reached):
            warnings.warn(f"out: {out} holds the finished run of an earlier version of the file", stacklevel=2)
        # Deleted by hand, perhaps because they were damaged: the steps that remain give them again.
        if not (out / "params").is_dir():
            raise ValueError(
                f"out: {out / 'params'} is not there, expected the parameters of a finished run; to make them again, "
                "delete its reached.json"
            )
        return reached
    with alone(out):
        # Checked again, as another process may have been first.
        folder.check_same(out, record)
        if not (out / "reached.json").exists():
            gone = folder.positions_of(earlier)
            sets = parts(data, ids, gone)
            if (groups := user_file.groups_to_go(own, data, ids, gone)) and is_compared(own, sets):
                logger.warning(user_file.of_groups_to_go(groups))
            try:
                records.write(out / "asked.json", record)
                if after is not None:
                    checkpoints.save(out / folder.START, params, {"data": data_digest})
                params, reached = _unlearned(own, params, sets, out, asked, on_step)
            except Exception:
                # A run that failed before it saved a step must not keep the folder, which the corrected one may need.
                if not any(step.name.isdigit() for step in (out / "steps").glob("*")):
                    for name in (folder.START, "steps"):
                        shutil.rmtree(out / name, ignore_errors=True)
                    # If the whole folder has vanished, that must not hide the error.
                    (out / "asked.json").unlink(missing_ok=True)
                raise
            checkpoints.save(out / "params", params, {"asked": record})
            reached |= {"returned": returned(own["task"], params, data, earlier)}
            records.write(out / "reached.json", reached | origin)
        return records.read(out / "reached.json", "reached")


def beginning(
    own: Mapping[str, Any], data_digest: str, count: int, ids: np.ndarray, after: Path | None
) -> tuple[chex.ArrayTree, list[dict]]:
    """The initial parameters of a run, and the records of what earlier runs forgot.

    Args:
      own, ids, after: As in `run`.
      data_digest, count: Digest and number of examples of the data.

    Raises:
      ValueError: If an earlier run already forgot some of the positions, or nothing would be retained.
    """
    params, earlier = (own["params"], []) if after is None else folder.end_of(after, own["params"], data_digest)
    if len(again := np.intersect1d(ids, folder.positions_of(earlier))):
        some = ", ".join(map(str, again[:NAMED]))
        raise ValueError(f"ids: got {some}, which an earlier run forgot, expected positions that are still retained")
    if len(ids) + len(folder.positions_of(earlier)) == count:
        raise ValueError(f"ids: got all {count} examples, expected some to retain")
    return params, earlier


def limited(asked: Asked, task: Task) -> Asked:
    """The settings with a limit of one point, if none is given and the task's error is a rate.

    Raises:
      ValueError: For a limit or a seed with which no run can begin.
    """
    most = 100 if task.is_rate else float(np.finfo(np.float32).max)
    if asked.limit is not None and not 0 < asked.limit <= most:
        wanted = "points of accuracy above 0, at most 100"
        wanted = wanted if task.is_rate else "a number above 0, in hundredths of the error"
        raise ValueError(f"limit: got {asked.limit}, expected {wanted}")
    check_counts(seed=asked.seed)
    return asked._replace(limit=1.0) if asked.limit is None and task.is_rate else asked


def settings_of(limit: float | None) -> dict[str, float]:
    """The settings of `unlearn` for a limit in points."""
    return {} if limit is None else {"allowed_error": limit / 100}


def is_compared(own: Mapping[str, Any], sets: tuple[Any, Any]) -> bool:
    """Whether all examples of the forget set are to be brought to the level of unseen data."""
    return own.get("held_out") is not None and not classes_to_go(own["task"], *sets)


def _unlearned(own, params, sets, out, asked, on_step):
    """The unlearned parameters, and the record of what was reached."""
    forget, retain = sets
    result = unlearn(
        METHOD,
        own["task"],
        params,
        forget,
        retain,
        own.get("held_out"),
        mesh=own.get("mesh"),
        frozen=own.get("frozen"),
        settings=settings_of(asked.limit),
        directory=out / "steps",
        on_step=on_step,
        **{name: value for name, value in asked._asdict().items() if name != "limit"},
    )
    level = result.level
    assert level is not None
    # Kept in the user's dtypes: float64 of NumPy would be restored as a different model.
    end = jax.tree.map(as_given, result.params, own["params"])
    least = least_of_noise(own["task"], params, result.params, level, forget)
    met, telling = judged(own, params, result.params, level, sets, least)
    return end, ({} if least is None else {"least": least}) | {
        "met": met,
        "telling": telling,
        "rates": own["task"].is_rate,
        "level": as_dict(level),
        "figures": result.figures,
        "history": result.history,
        "share": result.share,
        "passes": {"forward": result.forward, "backward": result.backward},
        "examples": {"forget": len(forget), "retain": len(retain)},
        "params": digest(end),
    }


def as_dict(level: Reached) -> dict:
    """The level as a dict for a record."""
    parts = {"unseen": level.unseen, "comparison": level.comparison}
    return level._asdict() | {name: part and part._asdict() for name, part in parts.items()}


def as_given(leaf, like):
    """The leaf in the dtype of the user's leaf."""
    dtype = getattr(like, "dtype", None) or np.asarray(like).dtype
    return leaf if leaf.dtype == dtype else np.asarray(leaf, dtype)


def parts(data: Any, ids: np.ndarray, gone: np.ndarray) -> tuple[Any, Any]:
    """The examples at these positions, and all others that were not already forgotten."""
    others = np.setdiff1d(np.arange(len(data)), np.concatenate([ids, gone]))
    return part_of(data, ids), part_of(data, others)
