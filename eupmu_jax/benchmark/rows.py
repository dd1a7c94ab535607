"""A file of rows, one JSON line each, that several processes append to and that a kill cannot spoil."""

import ast
import fcntl
import functools
import hashlib
import json
import os
from pathlib import Path

import eupmu_jax


def read(path: Path) -> list[dict]:
    """The rows of a file; none if there is no such file. A last line that a kill cut off is passed over."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in lines if line]


def append(path: Path, row: dict) -> None:
    """Adds a row; what follows the last complete one is dropped. NaN and infinity are not JSON and become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if _ends_within_a_line(file):
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        file.write(json.dumps(finite(row), allow_nan=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _ends_within_a_line(file):
    size = file.seek(0, os.SEEK_END)
    if not size:
        return False
    file.seek(size - 1)
    return file.read(1) != b"\n"


def finite(value):
    """`value` with None for every float that is NaN or infinite."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return None
    return value


def key(row: dict) -> str:
    """What makes a row the only one of its kind, in one state of design and code."""
    names = ("kind", "design", "digest", "forget", "model", "method", "trial", "seed")
    return json.dumps({name: row[name] for name in names if name in row}, sort_keys=True)


# What shows figures and does not make them.
_SHOWS = (
    "commands/cli.py",
    "commands/demo.py",
    "commands/plan.py",
    "commands/page.py",
    "benchmark/runner.py",
    "benchmark/summary.py",
    "benchmark/tables.py",
    "benchmark/figures.py",
)


@functools.cache
def code() -> str:
    """Hash of the syntax trees that figures come from: of what the package does, not of comments and docstrings."""
    total = hashlib.sha256()
    root = Path(eupmu_jax.__file__).parent
    for path in sorted(root.rglob("*.py")):
        if path.relative_to(root).as_posix() in _SHOWS:
            continue
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            match node:
                case ast.Expr(value=ast.Constant(value=str(_)) as text):
                    text.value = ""
        total.update(path.relative_to(root).as_posix().encode() + ast.dump(tree).encode())
    return total.hexdigest()[:12]
