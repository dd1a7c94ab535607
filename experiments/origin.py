"""What is needed to reproduce the rows of an experiment."""

import shlex
from pathlib import Path
from typing import Any

from eupmu_jax.benchmark import rows

ROOT = Path(__file__).parents[1]


def command(script: str, *arguments: Any) -> str:
    """The command that runs the script at path `script` from the root of the repository."""
    return shlex.join(["python", str(Path(script).resolve().relative_to(ROOT)), *map(str, arguments)])


def of(script: str, *arguments: Any) -> dict:
    """The provenance of the rows that `script` writes with these arguments."""
    return rows.provenance(command(script, *arguments))
