"""Rows of text from a local folder, in the file formats of published data sets."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# File names that a table may have; the first that exists is read.
_FILES = ("{}.json", "{}.jsonl", "{}.parquet", "{}-*.parquet", "{}/train-*.parquet", "{}/train/*.parquet")


def read(folder: Path, name: str, fields: Sequence[str], *, bare: str | None = None) -> tuple[list[dict], list[str]]:
    """All rows of a table with these fields, and the place of each, file and number, for messages.

    JSON is one object per line, or a list of objects. Parquet may be split over several files.

    Args:
      folder: folder of the data set.
      name: name of the table, with its subfolders ("raw/forget").
      fields: fields that every row must have; a row may have more.
      bare: the field for rows that are texts instead of objects; None if such rows are not allowed.

    Raises:
      FileNotFoundError: If there is no such file.
      ImportError: If the file is parquet and `pyarrow` is not installed.
      ValueError: If a file is malformed, has no rows, or has a row that lacks a field.
    """
    paths = next((found for pattern in _FILES if (found := sorted(folder.glob(pattern.format(name))))), None)
    if paths is None:
        tried = ", ".join(pattern.format(name) for pattern in _FILES)
        raise FileNotFoundError(f"folder: got {folder}, expected one of {tried} in it")
    rows, places = [], []
    for path in paths:
        for number, row in enumerate(_parquet(path) if path.suffix == ".parquet" else _json(path), 1):
            if bare and isinstance(row, str):
                row = {bare: row}
            if not isinstance(row, dict):
                raise ValueError(f"{path}, row {number}: got {row!r}, expected an object with {', '.join(fields)}")
            if missing := [field for field in fields if row.get(field) is None]:
                raise ValueError(
                    f"{path}, row {number}: got {', '.join(row) or 'no fields'} without {', '.join(missing)}, expected "
                    f"{', '.join(fields)}"
                )
            rows.append(row)
            places.append(f"{path}, row {number}")
    if not rows:
        raise ValueError(f"{paths[0]}: got no rows, expected {', '.join(fields)}")
    return rows, places


def texts(rows: Sequence[dict], field: str, places: Sequence[str]) -> tuple[str, ...]:
    """One field of all rows, which must be text.

    Raises:
      ValueError: If a value is not text.
    """
    for row, place in zip(rows, places, strict=True):
        if not isinstance(row[field], str):
            raise ValueError(f"{place}: got {row[field]!r} as {field}, expected a text")
    return tuple(row[field] for row in rows)


def _json(path: Path) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8")
        if text.lstrip().startswith("["):
            return json.loads(text)
        # Not splitlines, as a text may contain other kinds of line break.
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: got {error}, expected JSON in UTF-8, one object a line or one list") from error


def _parquet(path: Path) -> list[dict]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"{path}: reading parquet needs pyarrow; install eupmu-jax[language]") from error
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: got {error}, expected a parquet file") from error
