"""The nouns of WordNet 3.0, from the Debian package `wordnet-base`."""

import os
from pathlib import Path
from typing import NamedTuple

SOURCE_VARIABLE = "EUPMU_WORDNET"
DEBIAN_FILE = Path("/usr/share/wordnet/data.noun")

# Numbers of lexicographer files, from the manual page lexnames(5).
PLACES, PERSONS = "15", "18"


class Synset(NamedTuple):
    """One meaning.

    Attributes:
      id: its offset in the file, eight digits.
      file: its lexicographer file.
      names: its words, with blanks restored, the most common first.
      pointers: pairs of a pointer symbol and the target id, only for "@" (a kind of), "@i" (an instance of) and "#p" (a
        part of).
      gloss: the text after the bar.
    """

    id: str
    file: str
    names: tuple[str, ...]
    pointers: tuple[tuple[str, str], ...]
    gloss: str


def source() -> Path:
    """The file `data.noun` of the Debian package, or the one that the environment variable EUPMU_WORDNET names.

    Raises:
      FileNotFoundError: If it is not on this machine.
    """
    path = Path(os.environ.get(SOURCE_VARIABLE) or DEBIAN_FILE)
    if not path.is_file():
        raise FileNotFoundError(
            f"WordNet: no {path}; install Debian's package wordnet-base, or name its data.noun in the environment "
            f"variable {SOURCE_VARIABLE}"
        )
    return path


def synsets(path: Path, files: tuple[str, ...]) -> dict[str, Synset]:
    """Reads the synsets of some lexicographer files, by their ids and in the order of the file (see wndb(5)).

    Raises:
      ValueError: If a line is not a synset.
    """
    found = {}
    with path.open(encoding="ascii", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            # The licence, before the first synset, is indented.
            if line.startswith("  ") or line[9:11] not in files:
                continue
            try:
                synset = _synset(line)
            except (IndexError, ValueError) as error:
                raise ValueError(f"{path}, line {number}: got {line[:60]!r}, expected a synset of WordNet") from error
            found[synset.id] = synset
    return found


def _synset(line: str) -> Synset:
    head, gloss = line.split(" | ", 1)
    fields = head.split()
    words = int(fields[3], 16)
    start = 5 + 2 * words
    pointers = [fields[start + 4 * k :][:3] for k in range(int(fields[start - 1]))]
    return Synset(
        fields[0],
        fields[1],
        tuple(name.replace("_", " ") for name in fields[4 : 4 + 2 * words : 2]),
        tuple((symbol, target) for symbol, target, _ in pointers if symbol in ("@", "@i", "#p")),
        gloss.strip(),
    )
