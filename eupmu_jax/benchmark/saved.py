"""The rows of a benchmark that count: those of the present versions of their design and method.

Both versions are raised by hand when figures change. A trial must also have the settings that its method's ranges give.
Other rows stay in the file but are not shown, and are recomputed.
"""

from pathlib import Path
from typing import Any

from eupmu_jax.benchmark import rows, tuning
from eupmu_jax.benchmark.designs import DESIGNS
from eupmu_jax.methods import METHODS

NEEDED = ("kind", "design", "design_version", "forget", "seed")
KINDS: dict[str, tuple[Any, str]] = {
    **dict.fromkeys(("kind", "design", "forget", "method"), (str, "a string")),
    "seed": (int, "an int"),
    "trial": ((int, str), f"an int, or {tuning.UNTUNED!r}"),
}
# Of a trial that diverged they are a number too.
SCORES = ("blind", "gap")


def versions(design: str, method: str | None = None) -> dict:
    """The present values of `design_version` and, for a method's row, `method_version`."""
    found = {"design_version": DESIGNS[design].version}
    if method is not None:
        found["method_version"] = METHODS[method].version
    return found


def read(path: Path) -> list[dict]:
    """The rows of a file that count.

    Raises:
      ValueError: If a line is not a benchmark row, see `rows.read`, or has a field of the wrong type.
    """
    found = rows.read(path, NEEDED)
    for row in found:
        _check(row, path)
    return [row for row in found if _counts(row)]


def _check(row, path):
    """Raises `ValueError` if a field that identifies a row, or the score of a trial, is of the wrong type."""
    scores = [name for name in SCORES if name in row] if row["kind"] == "trial" else []
    for name in [*(name for name in KINDS if name in row), *scores]:
        kind, wanted = KINDS.get(name, ((int, float), "a number"))
        if not isinstance(row[name], kind) or isinstance(row[name], bool):
            raise ValueError(f"{path}: got a row with {name} {row[name]!r}, expected {wanted}")


def _counts(row):
    method = row.get("method")
    known = row["design"] in DESIGNS and (method is None or method in METHODS)
    return known and versions(row["design"], method).items() <= row.items() and _in_ranges(row)


def _in_ranges(row):
    trial = row.get("trial", tuning.UNTUNED)
    return trial == tuning.UNTUNED or row.get("settings") == tuning.settings(METHODS[row["method"]], trial)
