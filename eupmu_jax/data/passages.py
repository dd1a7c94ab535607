"""Passages of a text from a Debian package: the entries of Ambrose Bierce's Devil's Dictionary, as bytes."""

import gzip
import os
import re
import zlib
from pathlib import Path

import numpy as np

SOURCE_VARIABLE = "EUPMU_DEVIL"
DEBIAN_FILE = Path("/usr/share/dictd/devil.dict.dz")
VOCABULARY = 256

# One or several headwords in capitals, and the part of speech.
_HEAD = re.compile(r"^[A-Z](?:[A-Z' \-,()]|or(?= ))+, ?(?:n|v|adj|adv|pp|pron?|x|p)\.", re.MULTILINE)


def load(length: int) -> np.ndarray:
    """The first `length` bytes of every entry that is long enough, `(N, length)` int32, in the order of the file.

    Line breaks become spaces, so that a passage is one line of text. Duplicates are dropped. The file is that of
    Debian's package `dict-devil`, or the one that the environment variable EUPMU_DEVIL names.

    Raises:
      ValueError: For a length below 2, as the first token is given and the others are predicted, or above the length
        of every entry.
      FileNotFoundError: If the file is not on this machine.
    """
    if length < 2:
        raise ValueError(f"length: got {length}, expected at least 2 tokens")
    path = Path(os.environ.get(SOURCE_VARIABLE, DEBIAN_FILE))
    if not path.is_file():
        raise FileNotFoundError(
            f"no {path}; install Debian's package dict-devil, or name its devil.dict.dz in the environment variable "
            f"{SOURCE_VARIABLE}"
        )
    try:
        text = gzip.decompress(path.read_bytes()).decode("latin-1")
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path}: got {error}, expected the compressed devil.dict.dz") from error
    starts = [match.start() for match in _HEAD.finditer(text)]
    entries = [" ".join(text[a:b].split()) for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]
    passages = list(dict.fromkeys(entry.encode("latin-1")[:length] for entry in entries))
    if not (whole := [np.frombuffer(p, np.uint8) for p in passages if len(p) == length]):
        raise ValueError(f"length: got {length}, but the longest entry has {max(map(len, passages))} bytes")
    return np.stack(whole).astype(np.int32)


def text_of(tokens: np.ndarray) -> str:
    """The text of one passage.

    >>> text_of(np.array([82, 69, 65, 76]))
    'REAL'
    """
    return bytes(np.asarray(tokens, np.uint8)).decode("latin-1")
