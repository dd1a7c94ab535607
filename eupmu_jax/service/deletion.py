"""A user's model without some of his data: unlearned parameters in a folder, with what was asked and what was reached.

The folder has `asked.json`, what makes the run what it is; `steps/`, checkpoints from which the same call goes on; and
at the end `params/`, the unlearned parameters, and `reached.json`. Each is whole or absent at any moment.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import chex
import numpy as np

from eupmu_jax.benchmark.rows import finite, provenance
from eupmu_jax.service import user_file
from eupmu_jax.service.ids import NAMED
from eupmu_jax.tasks import Examples, as_examples, check_task
from eupmu_jax.training import checkpoints
from eupmu_jax.training._digest import digest
from eupmu_jax.training.unlearning import unlearn

METHOD = "EUPMU"
NEEDED = ("task", "params", "data")


class Asked(NamedTuple):
    """What makes a run what it is.

    Attributes:
      limit: Points that the error on the retained examples may rise by.
      steps, seed, forget_batch, retain_batch: As in `unlearn`.
    """

    limit: float = 1.0
    steps: int = 300
    seed: int = 0
    forget_batch: int = 64
    retain_batch: int = 192


class Part(NamedTuple):
    """Some examples of a source that gives batches for positions."""

    source: Any
    ids: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, positions) -> chex.ArrayTree:
        return self.source[self.ids[np.asarray(positions)]]


def run(path: Path, ids: np.ndarray, out: Path, asked: Asked, command: str, on_step: Callable = lambda: None) -> dict:
    """Unlearns examples of a user's data, or goes on from where the same call was stopped.

    Args:
      path: Of a Python file that defines `task`, `params` and `data`, and perhaps `held_out`; see `user_file.load`.
      ids: Positions in its data, as `read_ids` returns them.
      out: Folder of the run.
      asked: See `Asked`.
      command: For the record.
      on_step: Called after each step.

    Returns:
      What was reached, as it stands in `reached.json`: `figures` and `history` of `unlearn`, `level` with the target,
      the errors and the limit, `met` (whether the level was reached within the limit), digests, versions and device.

    Raises:
      ValueError: For a folder of another run (with what differs), a file without what is needed, positions of all
        examples, or numbers out of range.
      UserFileError: For what the file itself raises.
      InterruptedError: If SIGTERM ended the run; the same call goes on from it.
    """
    if not 0 < asked.limit <= 100:
        raise ValueError(f"limit: got {asked.limit}, expected points of accuracy above 0, at most 100")
    own = user_file.load(path, NEEDED)
    check_task(own["task"])
    data = as_examples("data", own["data"])
    if len(ids) == len(data):
        raise ValueError(f"ids: got all {len(data)} examples, expected some to retain")
    record = asked._asdict() | {
        "method": METHOD,
        "data": user_file.data_digest(data),
        "ids": digest(ids),
        "positions": ids.tolist(),
        "params": digest(own["params"]),
        "held_out": None if own.get("held_out") is None else user_file.data_digest(own["held_out"]),
    }
    out.mkdir(parents=True, exist_ok=True)
    _check_same(out, record)
    if (out / "reached.json").exists():
        return read(out / "reached.json")
    write(out / "asked.json", record)
    forget, retain = parts(data, ids)
    result = unlearn(
        METHOD,
        own["task"],
        own["params"],
        forget,
        retain,
        own.get("held_out"),
        settings={"allowed_error": asked.limit / 100},
        directory=out / "steps",
        on_step=on_step,
        **{name: value for name, value in asked._asdict().items() if name != "limit"},
    )
    level = result.level
    assert level is not None
    # Told apart from unseen data where there are any; else short of the target by more than a point.
    short = level.comparison.high < 0 if level.comparison else level.forget_error < level.target - 0.01
    reached = {
        "met": bool(level.kept and not short),
        "level": level._asdict()
        | {
            name: value and value._asdict()
            for name, value in (("unseen", level.unseen), ("comparison", level.comparison))
        },
        "figures": result.figures,
        "history": result.history,
        "share": result.share,
        "passes": {"forward": result.forward, "backward": result.backward},
        "examples": {"forget": len(ids), "retain": len(retain)},
        "params": digest(result.params),
        "asked": record,
        **provenance(command),
    }
    checkpoints.save(out / "params", result.params, {"asked": record})
    write(out / "reached.json", reached)
    return read(out / "reached.json")


def parts(data: Any, ids: np.ndarray) -> tuple[Any, Any]:
    """The examples at these positions, and all others."""
    others = np.setdiff1d(np.arange(len(data)), ids)
    if isinstance(data, Examples):
        return Examples(data.tree, data.ids[ids]), Examples(data.tree, data.ids[others])
    return Part(data, ids), Part(data, others)


def read(path: Path) -> dict:
    """A record of a run's folder; raises `ValueError` where it is not there or damaged."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(
            f"out: {path} is not there; expected the folder of a finished run of `eupmu unlearn`"
        ) from None
    except ValueError:
        raise ValueError(f"out: {path} is damaged; expected another folder") from None


def _check_same(out, record):
    """Raises `ValueError` where the folder has another run, before anything is written."""
    path = out / "asked.json"
    if not path.exists():
        # What begins with a dot a kill may have left.
        if others := sorted(found.name for found in out.iterdir() if not found.name.startswith(".")):
            raise ValueError(
                f"out: {out} has {', '.join(others[:NAMED])}, and is no folder of a run; expected an empty folder"
            )
        return
    saved = read(path)
    if differing := [name for name in record if saved.get(name) != record[name]]:
        listed = ", ".join(
            f"{name} {_short(record[name])} (there: {_short(saved.get(name))})"
            for name in differing
            if name != "positions"
        )
        raise ValueError(f"out: {out} is of another run; got {listed}; expected the same, or another folder")


def _short(value):
    return value[:12] if isinstance(value, str) else value


def write(path: Path, record: dict) -> None:
    """Writes a record whole or not at all, on the disk before it has its name; NaN and infinity become null."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with unfinished.open("w") as file:
        json.dump(finite(record), file, indent=1, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
