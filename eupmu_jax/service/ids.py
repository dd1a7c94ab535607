"""Files of ids: positions of examples in a data set, one per line."""

import hashlib
import re
from pathlib import Path

import numpy as np

# The most lines or positions that an error names.
NAMED = 5


def read_ids(path: Path, count: int) -> np.ndarray:
    r"""Reads positions in a data set, one per line; empty lines and text after a `#` are ignored.

    Args:
      path: Path of a UTF-8 text file, with or without a byte order mark.
      count: Number of examples in the data set.

    Returns:
      `(n,)` int64, in increasing order.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: For a line that is not a number, a position outside the data, a duplicate, no positions at all, or a
        file that is not text. The message names the file and the lines.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder) / "ids.txt"
    ...     _ = file.write_text("7\n3  # a letter of 3 May\n")
    ...     read_ids(file, count=10).tolist()
    [3, 7]
    """
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except FileNotFoundError:
        raise FileNotFoundError(f"ids: {path} is not there; expected a text file with one position per line") from None
    except (UnicodeDecodeError, IsADirectoryError):
        raise ValueError(f"ids: got {path}, expected a text file with one position per line") from None
    found: dict[int, int] = {}
    for number, line in enumerate(lines, 1):
        text, place = line.split("#", 1)[0].strip(), f"ids: {path}, line {number}"
        if not text:
            continue
        if not re.fullmatch(r"[0-9]{1,18}", text):
            raise ValueError(f"{place}: got {text[:40]!r}, expected a position from 0 to {count - 1}")
        position = int(text)
        if position >= count:
            raise ValueError(
                f"{place}: got {position}, but the data have {count} examples; "
                f"expected a position from 0 to {count - 1}"
            )
        if position in found:
            raise ValueError(
                f"{place}: got {position}, which line {found[position]} already has; expected each position once"
            )
        found[position] = number
    if not found:
        raise ValueError(f"ids: {path} has no positions, expected at least one")
    return np.sort(np.fromiter(found, np.int64, len(found)))


def digest_of_ids(ids: np.ndarray) -> str:
    """SHA-256 of positions in any order, as used in the ledger, in a run's records and in its report."""
    return hashlib.sha256(np.sort(ids).astype("<i8").tobytes()).hexdigest()
