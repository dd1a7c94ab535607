r"""MUSE, news and books to be forgotten, read from a local copy (Shi et al. 2024, arXiv 2407.06460).

Nothing is downloaded. The copy of one corpus, MUSE-News or MUSE-Books, is a folder with a folder for each subset, and
in it a file for each split, parquet or JSON.

| subset | splits | fields |
|---|---|---|
| raw | forget, retain1, retain2, holdout | text |
| privleak | forget, retain, holdout | text |
| verbmem | forget | prompt, gt |
| knowmem | forget_qa, retain_qa, and the same with _icl, examples for a prompt | question, answer |

`texts` also reads `scal`, `sust` and `train`, which have one text per row. MUSE forgets `forget` of `raw` and retains
`retain1`, in rows of tokens that `tokenized` makes.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from eupmu_jax._stack.checks import check_int
from eupmu_jax.data import _rows
from eupmu_jax.data.questions import Questions

_TEXTS = ("raw", "privleak", "scal", "sust", "train")
_PAIRS = {"verbmem": ("prompt", "gt"), "knowmem": ("question", "answer")}


def texts(folder: str | os.PathLike[str], subset: str, split: str) -> tuple[str, ...]:
    """The passages of a split of `raw`, `privleak`, `scal`, `sust` or `train`, in the order of the file.

    Raises:
      ValueError: If the subset has no passages, or the file is malformed; the message names file, row and field.
      FileNotFoundError: If the file is not in the folder.
      ImportError: If it is parquet and `pyarrow` (extra `language`) is not installed.
    """
    if subset not in _TEXTS:
        raise ValueError(f"subset: got {subset!r}, expected one of {', '.join(_TEXTS)}")
    rows, places = _rows.read(Path(folder), f"{subset}/{split}", ("text",), bare="text")
    return _rows.texts(rows, "text", places)


def questions(folder: str | os.PathLike[str], subset: str, split: str) -> Questions:
    """The pairs of a split of `knowmem`, or of `verbmem`: the beginning of a passage and its continuation.

    Returns:
      The pairs in the order of the file; `person` is -1, and there are no paraphrases or wrong answers.

    Raises:
      ValueError: If the subset has no pairs, or the file is malformed; the message names file, row and field.
      FileNotFoundError: If the file is not in the folder.
      ImportError: If it is parquet and `pyarrow` (extra `language`) is not installed.
    """
    if subset not in _PAIRS:
        raise ValueError(f"subset: got {subset!r}, expected one of {', '.join(_PAIRS)}")
    rows, places = _rows.read(Path(folder), f"{subset}/{split}", _PAIRS[subset])
    asked, told = (_rows.texts(rows, field, places) for field in _PAIRS[subset])
    return Questions(question=asked, answer=told, person=np.full(len(rows), -1, np.int32))


def tokenized(
    passages: Sequence[str], encode: Callable[[str], Sequence[int]], *, length: int, begin: int
) -> dict[str, np.ndarray]:
    r"""A batch for `tasks.language`: all tokens of the passages are predicted, none of them twice.

    As in MUSE, the passages are joined by line breaks and cut into rows of equal length, each of which starts with the
    begin token. The last row is filled up with it, and the filling is masked out.

    Args:
      passages: Such as `texts(folder, "raw", "forget")`.
      encode: text -> ids, without adding any tokens; `Tokenizer.encode` is such a function.
      length: Length of every row; MUSE's is 2048.
      begin: Id of the begin token, such as `tokenizer.encode("<s>")[0]`.

    Returns:
      tokens (N, length) int32, and mask (N, length) bool, true for the tokens of the passages.

    Raises:
      ValueError: For a single text, no passages or none with any text, `begin` that is not an id or that `encode` adds
        to a text, or a length below 2.

    >>> batch = tokenized(["abc", "de"], lambda text: list(text.encode()), length=5, begin=0)
    >>> [bytes(row.tolist()) for row in batch["tokens"]]
    [b'\x00abc\n', b'\x00de\x00\x00']
    >>> batch["mask"].astype(int).tolist()
    [[0, 1, 1, 1, 1], [0, 1, 1, 0, 0]]
    """
    check_int("length", length, 2, static=True)
    if isinstance(begin, bool) or not isinstance(begin, int | np.integer) or begin < 0:
        raise ValueError(f"begin: got {begin!r}, expected the id of the begin token")
    is_text = isinstance(passages, str)
    ids = np.asarray([] if is_text else encode("\n".join(passages)), np.int32)
    if not len(ids):
        given = f"the text {passages[:40]!r}" if is_text else "no text"
        raise ValueError(f"passages: got {given}, expected a list of at least one text")
    if ids[0] == begin:
        raise ValueError(f"encode: got the begin token {begin} before the text, expected ids without added tokens")
    rows = -(-len(ids) // (length - 1))
    tokens = np.full((rows, length), begin, np.int32)
    mask = np.zeros((rows, length), bool)
    mask[:, 1:].flat[: len(ids)] = True
    tokens[mask] = ids
    return {"tokens": tokens, "mask": mask}
