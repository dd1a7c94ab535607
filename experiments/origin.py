"""What the rows of an experiment need to be made again."""

import shlex
from pathlib import Path
from typing import Any

from eupmu_jax.benchmark import rows

ROOT = Path(__file__).parents[1]


def command(script: str, *arguments: Any) -> str:
    """The command that runs `script`, a path, from the root of the repository."""
    return shlex.join(["python", str(Path(script).resolve().relative_to(ROOT)), *map(str, arguments)])


def of(script: str, *arguments: Any) -> dict:
    """Provenance of the rows that `script` makes with these arguments."""
    return rows.provenance(command(script, *arguments))
