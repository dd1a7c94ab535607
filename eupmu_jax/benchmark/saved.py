"""The rows of a benchmark that count: those of the present versions of their design and method.

Both versions are raised by hand when figures change. A trial must also have the settings that its method's ranges give.
Other rows stay in the file but are not shown, and are recomputed.
"""

from pathlib import Path

from eupmu_jax.benchmark import rows, tuning
from eupmu_jax.benchmark.designs import DESIGNS
from eupmu_jax.methods import METHODS

NEEDED = ("kind", "design", "design_version", "forget", "seed")


def versions(design: str, method: str | None = None) -> dict:
    """The present values of `design_version` and, for a method's row, `method_version`."""
    found = {"design_version": DESIGNS[design].version}
    if method is not None:
        found["method_version"] = METHODS[method].version
    return found


def read(path: Path) -> list[dict]:
    """The rows of a file that count; raises `ValueError` if a line is not a benchmark row, see `rows.read`."""
    return [row for row in rows.read(path, NEEDED) if _counts(row)]


def _counts(row):
    method = row.get("method")
    known = row["design"] in DESIGNS and (method is None or method in METHODS)
    return known and versions(row["design"], method).items() <= row.items() and _in_ranges(row)


def _in_ranges(row):
    trial = row.get("trial", tuning.UNTUNED)
    return trial == tuning.UNTUNED or row.get("settings") == tuning.settings(METHODS[row["method"]], trial)
