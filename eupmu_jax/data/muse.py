r"""MUSE, news and books to be forgotten, read from a local copy (Shi et al. 2024, arXiv 2407.06460).

Nothing is downloaded. The copy of one corpus, MUSE-News or MUSE-Books, is a folder with a folder for each subset, and
in it a file for each split, parquet or JSON.

| subset | splits | fields |
|---|---|---|
| raw | forget, retain1, retain2, holdout | text |
| privleak | forget, retain, holdout | text |
| verbmem | forget | prompt, gt |
| knowmem | forget_qa, retain_qa, and the same with _icl, examples for a prompt | question, answer |

`texts` also reads `scal`, `sust` and `train`, which have one text per row. MUSE forgets `forget` of `raw`, retains
`retain1`, and trains on rows of equal length that begin with the tokenizer's begin token, cut from all passages end to
end. For `tasks.language`, which predicts all tokens of a row but the first:

    begin, *ids = tokenizer.encode("<s>" + "\n".join(muse.texts(folder, "raw", "forget")))
    rows = np.reshape(ids[: len(ids) // 2047 * 2047], (-1, 2047))
    forget = {"tokens": np.insert(rows, 0, begin, axis=1)}
"""

import os
from pathlib import Path

import numpy as np

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
