"""A TOML file with what is not code: the numbers of a run."""

import difflib
import logging
import tomllib
from pathlib import Path
from typing import Any, get_args, get_type_hints

from eupmu_jax.service.deletion import Asked

logger = logging.getLogger("eupmu_jax")
# The fields and their types, each with what else may stand for it and its name.
KINDS = {name: next(iter(get_args(kind)), kind) for name, kind in get_type_hints(Asked).items()}
ACCEPTED: dict[type, tuple[Any, str]] = {int: (int, "a whole number"), float: ((int, float), "a number")}


def beside(file: Path) -> Path | None:
    """The TOML file of a user's file, mytask.toml of mytask.py, where that is there and has some field of `Asked`.

    One that has a field in a table, or something much like a field, is taken too, so that `asked` names the mistake. A
    file of something else is left alone, and one that is no TOML with a warning.
    """
    path = file.with_suffix(".toml") if file.suffix else file
    try:
        found = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError):
        return None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        logger.warning("config: %s is left alone, as it is no TOML (%s)", path, error)
        return None
    inside = [name for table in found.values() if isinstance(table, dict) for name in table]
    meant = set(inside) & set(KINDS) or any(difflib.get_close_matches(name, KINDS, cutoff=0.8) for name in found)
    return path if path != file and (not found or meant) else None


def asked(path: Path | None, **given: float | int | None) -> Asked:
    """What is asked of a run: what is given, else what the TOML file says, else the default.

    Args:
      path: Of a TOML file with any of the fields of `Asked`; None for none.
      given: The same fields; None where the file is to say.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: For a file that is no TOML, a field that is none of them, or one of another type.

    >>> asked(None, limit=0.5, steps=None)
    Asked(limit=0.5, steps=300, seed=0, forget_batch=64, retain_batch=192)
    """
    found = {} if path is None else _read(path)
    return Asked(**(found | {name: value for name, value in given.items() if value is not None}))


def _read(path):
    try:
        found = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"config: {path} is not there; expected a TOML file, as `eupmu init` writes one"
        ) from None
    except (IsADirectoryError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise ValueError(f"config: {path} cannot be read ({error}); expected a TOML file") from None
    for name, value in found.items():
        if name not in KINDS:
            raise ValueError(f"config: {path} has {name!r}, expected some of {', '.join(KINDS)}")
        accepted, described = ACCEPTED[KINDS[name]]
        if isinstance(value, bool) or not isinstance(value, accepted):
            raise ValueError(f"config: {path} has {str(value)[:40]!r} for {name}, expected {described}")
    return found
