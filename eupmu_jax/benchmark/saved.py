"""The rows of a benchmark that count: those of the present version of their design and of their method.

Both versions are raised by hand when figures change. Rows of another one stay in the file, are not shown, and are made
again.
"""

from pathlib import Path

from eupmu_jax.benchmark import rows
from eupmu_jax.benchmark.designs import DESIGNS
from eupmu_jax.methods import METHODS

NEEDED = ("kind", "design", "design_version", "forget", "seed")


def versions(design: str, method: str | None = None) -> dict:
    """The fields `design_version` and, for a method's row, `method_version`, as they are now."""
    found = {"design_version": DESIGNS[design].version}
    if method is not None:
        found["method_version"] = METHODS[method].version
    return found


def read(path: Path) -> list[dict]:
    """The rows of a file that count; raises `ValueError` where a line is no row of a benchmark, see `rows.read`."""
    return [row for row in rows.read(path, NEEDED) if _counts(row)]


def _counts(row):
    method = row.get("method")
    known = row["design"] in DESIGNS and (method is None or method in METHODS)
    return known and versions(row["design"], method).items() <= row.items()
