"""Files of rows: one JSON line for each, with what it needs to be made again."""

import json
import shlex
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import jax

RESULTS = Path(__file__).parent / "results"


def read(name: str) -> list[dict]:
    """The rows of `results/NAME.jsonl`; none if there is no such file."""
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def markdown(head: list[str], lines: list[list[str]]) -> str:
    """A table whose first column is text and whose others are figures."""
    table = [head, ["---"] + ["---:"] * (len(head) - 1), *lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in table)


def provenance(script: str, *arguments) -> dict:
    """What a row needs to be made again."""
    return {
        "versions": {package: version(package) for package in ("eupmu-jax", "jax", "optax", "flax", "numpy")},
        "device": jax.devices()[0].device_kind,
        "command": shlex.join(map(str, ["python", f"experiments/{script}.py", *arguments])),
    }


class Rows:
    """A file that grows; what it has already is not made again.

    Args:
      name: Of the file in `results/`.
      provenance: Added to every row.
    """

    def __init__(self, name: str, provenance: dict):
        self.path, self.rows, self.provenance = RESULTS / f"{name}.jsonl", read(name), provenance
        self.made = {self._identity({field: row[field] for field in row["key"]}) for row in self.rows}

    def found(self, **fields) -> list[dict]:
        """Rows with these fields."""
        return [row for row in self.rows if all(row.get(name) == value for name, value in fields.items())]

    def add(self, key: dict, make: Callable[[], dict]) -> None:
        """Appends the fields of `key` and `make()`, unless there is a row of that key."""
        if self._identity(key) in self.made:
            return
        row = {**make(), **key, "key": list(key), **self.provenance}
        self.rows.append(row)
        self.made.add(self._identity(key))
        self.path.parent.mkdir(exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    @staticmethod
    def _identity(key):
        return json.dumps(key, sort_keys=True)
