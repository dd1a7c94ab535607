"""The user's Python file, which defines their data, task and model."""

import contextlib
import difflib
import hashlib
import runpy
import sys
import sysconfig
import traceback
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from eupmu_jax.tasks import Examples, as_examples
from eupmu_jax.training._digest import digest
from eupmu_jax.training._inputs import on_host

# Names that a file may define in addition to those needed.
OPTIONAL = ("held_out", "frozen", "mesh", "retrain", "groups", "shadows")
# Number of examples read at a time.
CHUNK = 1_000


class UserFileError(Exception):
    """An error raised by a user's own file, with only the lines of that file."""


def load(path: Path, needed: tuple[str, ...]) -> dict[str, Any]:
    """Runs a user's file and returns the names it defines; with a mesh, its examples are moved to the host.

    The file is code that the user chose; nothing read from a checkpoint, a ledger or a report is ever executed. If it
    changes the working directory, that is restored.

    Args:
      path: Path of a Python file. It and its functions can import modules next to it.
      needed: Names that it has to define.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: If it is not a Python file, or does not define a needed name.
      UserFileError: For anything that the file itself raises, including `SystemExit`.
    """
    if path.is_dir():
        raise ValueError(f"file: got {path}, which is a folder, expected a Python file; a run's folder goes before it")
    if not path.is_file():
        raise FileNotFoundError(f"file: {path} is not there; expected a Python file that defines {_listed(needed)}")
    if path.suffix != ".py":
        raise ValueError(f"file: got {path}, expected a Python file that defines {_listed(needed)}")
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        # Paths on the command line mean the same after a file that changes the working directory.
        with contextlib.chdir("."), own_errors(path):
            found = runpy.run_path(str(path), run_name="eupmu_user_file")
    except SyntaxError as error:
        raise UserFileError("".join(traceback.format_exception_only(error)).strip()) from error
    for name in set(OPTIONAL) - set(found):
        for like in difflib.get_close_matches(name, found, n=1, cutoff=0.9):
            warnings.warn(f"file: {path} defines `{like}`, which is not read; `{name}` is", stacklevel=2)
    if lacking := [name for name in needed if name not in found]:
        raise ValueError(f"file: {path} does not define {_listed(lacking)}; expected {_listed(needed)} in it")
    if found.get("mesh") is not None:
        # Parameters that lie on the mesh are measured too, and JAX takes no examples on one device beside them.
        for name in ("data", "held_out"):
            if (given := found.get(name)) is not None:
                moved = on_host(as_examples(name, given))
                is_tree = isinstance(moved, Examples) and not isinstance(given, Examples)
                found[name] = moved.tree if is_tree else moved
    return found


@contextlib.contextmanager
def own_errors(path: Path) -> Iterator[None]:
    """Turns errors raised by code of a user's file, whenever it is called, into a `UserFileError` with its lines."""
    try:
        yield
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        if not (own := [frame for frame in frames if _is_own(Path(frame.filename), path)]):
            raise
        lines = "".join(["Traceback, the lines of your file:\n", *traceback.format_list(own)])
        raise UserFileError(f"{lines}{type(error).__qualname__}: {error}") from error


def _is_own(module, path):
    """Whether a module is the user's file or lies next to it; this package and installed ones do not count."""
    if module == path:
        return True
    libraries = Path(__file__).parents[1], sysconfig.get_path("stdlib")
    foreign = "site-packages" in module.parts or any(map(module.is_relative_to, libraries))
    return module.is_relative_to(path.resolve().parent) and not foreign


def data_digest(data: Any, name: str = "data") -> str:
    """SHA-256 in hex of all examples of a data set in order; reads each once.

    >>> data_digest({"x": np.arange(3)}) == data_digest({"x": np.arange(3)})
    True
    >>> data_digest({"x": np.arange(3)}) == data_digest({"x": np.array([0, 2, 1])})
    False
    """
    examples, found = as_examples(name, data), hashlib.sha256()
    for start in range(0, len(examples), CHUNK):
        found.update(digest(examples[np.arange(start, min(start + CHUNK, len(examples)))]).encode())
    return found.hexdigest()


def groups_of(own: Mapping[str, Any], data: Any, forgotten: np.ndarray) -> np.ndarray | None:
    """The user's group of each retained example, or None without groups; raises `ValueError` for invalid ones."""
    groups = own.get("groups")
    if groups is not None and np.shape(groups) != (len(data),):
        raise ValueError(f"groups: got shape {np.shape(groups)}, expected ({len(data)},): one for each example of data")
    if groups is None:
        return None
    groups = np.asarray(groups)
    # Missing values are None or NaN, which differs from itself.
    if len(missing := np.flatnonzero([group is None or group != group for group in groups.tolist()])):
        raise ValueError(f"groups: got {groups[missing[0]]} for example {missing[0]}, expected a group for each")
    try:
        np.unique(groups)
    except TypeError as error:
        raise ValueError(f"groups: got groups that cannot be sorted ({error}), expected all of one type") from error
    return np.delete(groups, forgotten)


def _listed(names):
    return ", ".join(f"`{name}`" for name in names)


def groups_to_go(own: Mapping[str, Any], data: Any, ids: np.ndarray, earlier: np.ndarray) -> int:
    """How many of the user's groups only these positions have, beside those that earlier runs forgot."""
    staying = groups_of(own, data, np.concatenate([ids, earlier]))
    return 0 if staying is None else len(np.setdiff1d(np.asarray(own["groups"])[ids], staying))


def of_groups_to_go(count: int) -> str:
    """A sentence on what to hold out where groups are to be forgotten entirely."""
    return (
        f"Groups to be forgotten entirely: {count:,}. A model has a lower error on unseen examples of groups that it "
        "knows than on those of a group it never saw, so `held_out` should hold only groups that it never saw."
    )
