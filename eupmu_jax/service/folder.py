"""The folder of a run that unlearns a user's data, and checks that it belongs to that run.

It holds `asked.json`, which identifies the run; `start/`, the parameters of the run before, if there is one; `steps/`,
checkpoints from which the same call resumes; at the end `params/`, the unlearned parameters, and `reached.json`; and
`retrained/`, if retraining was requested. At any moment each of them is complete or absent.
"""

import hashlib
from pathlib import Path

import chex
import numpy as np

from eupmu_jax.service import records
from eupmu_jax.service.ids import NAMED
from eupmu_jax.training import checkpoints
from eupmu_jax.training._digest import digest

START = "start"


def positions_of(earlier: list[dict]) -> np.ndarray:
    """All positions that earlier runs forgot."""
    return np.array([position for run in earlier for position in run["positions"]], np.int64)


def forgotten_by(out: Path) -> np.ndarray:
    """All positions that a run and those before it forgot, or were asked to forget."""
    asked = records.read(out / "asked.json", "asked")
    return positions_of([*asked["earlier"], asked])


def start_of(out: Path, params: chex.ArrayTree, data_digest: str) -> chex.ArrayTree:
    """The initial parameters of a run: those of the user's file, or the copy it keeps of those of the run before."""
    found = checkpoints.load(out / START, params, {"data": data_digest})
    return params if found is None else found[0]


def end_of(after: Path, like: chex.ArrayTree, data_digest: str) -> tuple[chex.ArrayTree, list[dict]]:
    """The final parameters of a finished run, and what it and the runs before it forgot."""
    asked, reached = (records.read(after / f"{name}.json", name, "after") for name in ("asked", "reached"))
    if asked["data"] != data_digest:
        raise ValueError(f"after: {after} is a run on other data than the file's, expected a run on the file's data")
    found = checkpoints.load(after / "params", like, {})
    if found is None or digest(found[0]) != reached["params"]:
        raise ValueError(f"after: {after / 'params'} has other parameters than the run ended with, expected those")
    level = reached["level"]
    gone = {"positions": asked["positions"], "target": level["target"]}
    if level["comparison"] and level.get("interval"):
        gone["interval"] = level["interval"]
    return found[0], [*asked["earlier"], gone]


def is_of_other_code(path: Path | str | None, reached: dict) -> bool:
    """Whether the user's file is known to differ from the one that the run used."""
    return None not in (path, reached["code"]) and code_of(path) != reached["code"]


def code_of(path: Path | str | None) -> str | None:
    """SHA-256 of the user's file, if there is one."""
    return None if path is None else hashlib.sha256(Path(path).read_bytes()).hexdigest()


def check_same(out: Path, record: dict) -> None:
    """Raises `ValueError` if the folder holds another run, before anything is written."""
    path = out / "asked.json"
    if not path.exists():
        # Files that begin with a dot may be left over from a killed process.
        if others := sorted(found.name for found in out.iterdir() if not found.name.startswith(".")):
            raise ValueError(
                f"out: {out} has {', '.join(others[:NAMED])}, and is not the folder of a run; expected an empty folder"
            )
        return
    saved = records.read(path, "asked")
    if differing := [name for name in record if saved.get(name) != record[name]]:
        listed = ", ".join(
            "another run to start from"
            if name == "earlier"
            else f"{name} {_short(record[name])} (there: {_short(saved.get(name))})"
            for name in differing
            if name != "positions"
        )
        raise ValueError(f"out: {out} belongs to another run; got {listed}; expected the same, or another folder")


def _short(value):
    return value[:12] if isinstance(value, str) else value
