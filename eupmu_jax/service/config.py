"""The TOML file with the settings of a run that are not code."""

import difflib
import logging
import tomllib
from pathlib import Path
from typing import Any, get_args, get_type_hints

from eupmu_jax.service.deletion import Asked

logger = logging.getLogger("eupmu_jax")
# The fields of `Asked` and their types.
KINDS = {name: next(iter(get_args(kind)), kind) for name, kind in get_type_hints(Asked).items()}
ACCEPTED: dict[type, tuple[Any, str]] = {int: (int, "a whole number"), float: ((int, float), "a number")}


def beside(file: Path) -> Path | None:
    """The TOML file next to a user's file, mytask.toml for mytask.py, if it exists and has any field of `Asked`.

    A file with a field inside a table, or with a misspelt field, is returned too, so that `asked` reports the mistake.
    Other files are ignored, with a warning if they are not valid TOML.
    """
    path = file.with_suffix(".toml") if file.suffix else file
    try:
        found = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError):
        return None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        logger.warning("config: %s is ignored, as it is not valid TOML (%s)", path, error)
        return None
    inside = [name for table in found.values() if isinstance(table, dict) for name in table]
    meant = set(inside) & set(KINDS) or any(difflib.get_close_matches(name, KINDS, cutoff=0.8) for name in found)
    return path if path != file and (not found or meant) else None


def asked(path: Path | None, **given: float | int | None) -> Asked:
    """The settings of a run: the given values, else those of the TOML file, else the defaults.

    Args:
      path: Path of a TOML file with any of the fields of `Asked`; None for no file.
      given: The same fields; None takes the value of the file.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: If the file is not valid TOML, or has an unknown field or one of the wrong type.

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
            f"config: {path} is not there; expected a TOML file, such as `eupmu init` writes"
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
