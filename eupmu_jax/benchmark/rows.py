"""A file of rows, one JSON line each, to which several processes can append and which survives a kill.

What the rows of one run of a program share (`SHARED`) is stored once, in a line above them named by their field `run`:

    {"kind": "provenance", "run": "5f1c09ab", "versions": {"jax": "0.10.2"}, "device": "cpu", "command": "eupmu demo"}
    {"method": "SalUn", "gap": 1.3, "run": "5f1c09ab"}

`append` and `replace` take rows that include these fields, and `read` returns them so.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO

import jax

SHARED = ("versions", "device", "cores", "command")
PACKAGES = (
    "eupmu-jax",
    "jax",
    "jaxlib",
    "libtpu",
    "optax",
    "flax",
    "orbax-checkpoint",
    "numpy",
    "scipy",
    "scikit-learn",
)
_PROVENANCE = "provenance"
# What a kill may leave of a file's first row.
_CUT = re.compile(rb'\{("[^\n]*)?\Z')


def provenance(command: str, device: str | None = None) -> dict:
    """What is needed to reproduce a row: versions of the installed packages, device, cores and command.

    Args:
      command: The command that computes the row.
      device: Kind of the device, if it is not the first device of this process.
    """
    versions = {package: found for package in PACKAGES if (found := _version(package))}
    device = device or jax.devices()[0].device_kind
    return {"versions": versions, "device": device, "cores": len(cores()), "command": command}


def cores() -> list[int]:
    """The processor cores that this process may use; all of them on systems that do not report it."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _version(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def read(path: Path, needed: Sequence[str] = ()) -> list[dict]:
    """The rows of a file; none if there is no such file. A last line that a kill cut off is skipped.

    Args:
      path: Path of the file.
      needed: Fields that every row must have.

    Raises:
      ValueError: With file and line number, for a line that is not a JSON object with fields, a row without a needed
        field, or a row of a run that no line above it describes.
    """
    runs: dict[str, dict] = {}
    found = []
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    if lines and not _fields(lines[-1]):
        lines.pop()
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        place = f"{path}, line {number}"
        row = _fields(line)
        if not row:
            start = line[:40].decode(errors="replace")
            raise ValueError(f"{place}: got {start!r}, expected a row, which is a JSON object with fields")
        run = row.pop("run", None)
        if row.get("kind") == _PROVENANCE:
            runs[run] = {name: row[name] for name in SHARED if name in row}
            continue
        if run is not None and run not in runs:
            raise ValueError(f"{place}: got a row of run {run!r}, expected a line above it with that run's provenance")
        row |= runs.get(run, {})
        if lacking := [name for name in needed if name not in row]:
            raise ValueError(f"{place}: got a row without {', '.join(lacking)}, expected one with {', '.join(needed)}")
        found.append(row)
    return found


def _fields(line):
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def select(rows: Iterable[dict], **fields: Any) -> list[dict]:
    """The rows whose fields have these values."""
    return [row for row in rows if all(name in row and row[name] == value for name, value in fields.items())]


def append(path: Path, row: dict) -> None:
    """Appends a row, after dropping a last line that a kill cut off. NaN and infinity are not JSON and become null.

    Raises:
      ValueError: For a file that does not begin with a row; it stays as it is.
    """
    run, shared, line = _lines(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        before = file.read()
        if before.strip() and not _fields(before.lstrip().split(b"\n", 1)[0]) and not _CUT.match(before):
            raise ValueError(f"{path}: begins with {before[:40].decode(errors='replace')!r}, expected a file of rows")
        end = before.rfind(b"\n") + 1
        if _fields(before[end:]):
            # An editor omitted the last newline.
            file.write(b"\n")
            end = len(before)
        elif end < len(before):
            file.truncate(end)
        known = run is None or before.find(_start(run), 0, end) >= 0
        file.write(line if known else shared + line)
        file.flush()
        os.fsync(file.fileno())


def add(path: Path, key: dict, make: Callable[[], dict], origin: dict) -> None:
    """Appends the fields of `make()`, `key` and `origin`, unless the file has a row with the fields of `key`."""
    if not select(read(path), **key):
        append(path, key | make() | key | origin)


def replace(path: Path, rows: Iterable[dict]) -> None:
    """Replaces a file by these rows, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        known = {None}
        for row in rows:
            run, shared, line = _lines(row)
            file.write(line if run in known else shared + line)
            known.add(run)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A context with a file to write that atomically replaces `path` at the end, and that an error removes."""
    # Not the process number: two containers that share the folder may both have 1.
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            # A full disk does not say which file it has no space for.
            error.filename = str(path)
        raise


def _lines(row):
    """The name of the run, the line of what its rows share, and the line of the row."""
    if "run" in row or row.get("kind") == _PROVENANCE:
        raise ValueError(
            f"row: got a field `run` or the kind {_PROVENANCE!r}, expected neither: they are the file's own"
        )
    row = finite(row)
    shared = {name: row.pop(name) for name in SHARED if name in row}
    encode = lambda value: json.dumps(value, allow_nan=False).encode() + b"\n"
    if not shared:
        return None, b"", encode(row)
    run = hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:8]
    return run, encode({"kind": _PROVENANCE, "run": run, **shared}), encode(row | {"run": run})


def _start(run):
    return json.dumps({"kind": _PROVENANCE, "run": run}).encode()[:-1]


def finite(value: Any) -> Any:
    """`value` with None for every float that is NaN or infinite."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return None
    return value
