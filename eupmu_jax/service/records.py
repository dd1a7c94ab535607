"""Records in the folder of a run: JSON files that are complete or absent, and follow the published schema."""

import functools
import json
from importlib import resources
from pathlib import Path
from typing import Any

from eupmu_jax.benchmark.rows import finite, replacing


@functools.cache
def schema() -> dict[str, Any]:
    """The JSON schema of a report, with those of the records it contains in `$defs`.

    >>> schema()["$defs"]["report"]["required"]
    ['version', 'asked', 'reached', 'audit', 'files']
    """
    return json.loads(resources.files("eupmu_jax.service").joinpath("records.schema.json").read_text("utf-8"))


VERSION = schema()["$defs"]["report"]["properties"]["version"]["const"]
# What the page of a report draws of a history.
DRAWN = ("step", "forget_error", "retain_error")


@functools.cache
def _validator(kind):
    from jsonschema import Draft202012Validator

    return Draft202012Validator({"$ref": f"#/$defs/{kind}", "$defs": schema()["$defs"]})


def read(path: Path, kind: str, argument: str = "") -> dict[str, Any]:
    """Reads a record of a kind: "asked", "reached", "audit" or "report"; messages begin with the name of the argument.

    Raises:
      ValueError: If it is missing, is not JSON, or does not match the schema.
    """
    argument = argument or ("report" if kind == "report" else "out")
    try:
        record = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        made = {"audit": "audit", "report": "report"}.get(kind, "unlearn")
        wanted = "finished and audited run" if kind == "audit" else "finished run"
        raise ValueError(
            f"{argument}: {path} is not there; expected the folder of a {wanted}, as `eupmu {made}` writes it"
        ) from None
    except (ValueError, RecursionError, IsADirectoryError):
        raise ValueError(f"{argument}: {path} is damaged; expected JSON that `eupmu` wrote") from None
    check(record, kind, f"{argument}: {path}")
    return record


def check(record: Any, kind: str, place: str) -> None:
    """Raises `ValueError` if a record does not match the schema of its kind; the message begins with `place`."""
    if kind == "report" and isinstance(record, dict) and record.get("version") != VERSION:
        raise ValueError(f"{place} has version {_short(record.get('version'))}, expected {VERSION}")
    if error := next(_validator(kind).iter_errors(record), None):
        where = "/".join(map(str, error.absolute_path)) or "the whole"
        wanted = json.dumps({error.validator: error.validator_value})[:200]
        raise ValueError(f"{place} has {_short(error.instance)} for {where}, expected by the schema: {wanted}")
    if kind in ("reached", "report"):
        _check_history((record["reached"] if kind == "report" else record)["history"], place)


def _check_history(history, place):
    """Raises `ValueError` for a history that no page can show; the schema cannot compare lengths."""
    lengths = {name: len(values) for name, values in history.items()}
    if len(set(lengths.values())) != 1 or not set(DRAWN) <= set(history):
        raise ValueError(
            f"{place} has a history of {_short(lengths)}, expected equally long lists, among them {', '.join(DRAWN)}"
        )


def write(path: Path, record: dict[str, Any]) -> None:
    """Writes a record atomically, synced to disk before it is renamed into place; NaN and infinity become null."""
    text = json.dumps(finite(record), indent=1, allow_nan=False)
    with replacing(path) as file:
        file.write(text.encode())


def _short(value):
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
