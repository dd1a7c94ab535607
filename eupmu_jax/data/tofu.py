"""TOFU, questions about authors who do not exist, read from a local copy (Maini et al. 2024, arXiv 2401.06121).

Nothing is downloaded. A copy is a folder with the files of the data set: one file of JSON lines per table, or the same
tables as parquet.

| tables | fields |
|---|---|
| full, forget01, forget05, forget10, retain99, retain95, retain90, holdout01, holdout05, holdout10 | question, answer |
| forget01_perturbed and the like, retain_perturbed | also paraphrased_question, paraphrased_answer, perturbed_answer |
| real_authors_perturbed, world_facts_perturbed | question, answer, perturbed_answer |
| real_authors, world_facts | question, answer, option1 to option4 |

`perturbed_answer` is a list of five answers for authors of TOFU, and of three in the other two tables.
"""

import os
import re
from pathlib import Path

import numpy as np

from eupmu_jax.data import _rows
from eupmu_jax.data.questions import Questions

QUESTIONS_PER_AUTHOR = 20
_PLAIN = re.compile(r"full|(?:forget|retain|holdout)[0-9]{2}")
_PERTURBED = re.compile(r"(?:retain|(?:forget|holdout)[0-9]{2})_perturbed")
_OTHERS = ("real_authors", "world_facts")
_OPTIONS = ("option1", "option2", "option3", "option4")


def load(folder: str | os.PathLike[str], table: str) -> Questions:
    """Reads one table.

    Args:
      folder: the local copy.
      table: its name, as in the list above.

    Returns:
      The pairs in the order of the file. `person` counts authors within a table with twenty questions per author; it is
      -1 in `real_authors`, `world_facts` and in tables of another length. `wrong_answers` are the perturbed ones, or
      the options other than the answer; paraphrases and wrong answers are None if the table has none.

    Raises:
      ValueError: If there is no table of that name, or the file is malformed; the message names file, row and field.
      FileNotFoundError: If the file is not in the folder.
      ImportError: If it is parquet and `pyarrow` (extra `language`) is not installed.
    """
    base = table.removesuffix("_perturbed")
    perturbed = bool(_PERTURBED.fullmatch(table))
    if not (_PLAIN.fullmatch(table) or perturbed or base in _OTHERS):
        raise ValueError(f"table: got {table!r}, expected one of TOFU's, such as forget10, forget10_perturbed or full")
    more: tuple[str, ...] = ()
    if table in _OTHERS:
        more = _OPTIONS
    elif perturbed:
        more = ("paraphrased_question", "paraphrased_answer", "perturbed_answer")
    elif base in _OTHERS:
        more = ("perturbed_answer",)
    rows, places = _rows.read(Path(folder), table, ("question", "answer", *more))
    column = lambda field: _rows.texts(rows, field, places)
    wrong = None
    if table in _OTHERS:
        options = zip(*(column(field) for field in _OPTIONS), strict=True)
        wrong = [[one for one in four if one != row["answer"]] for four, row in zip(options, rows, strict=True)]
    elif more:
        wrong = [row["perturbed_answer"] for row in rows]
    whole = base not in _OTHERS and len(rows) % QUESTIONS_PER_AUTHOR == 0
    return Questions(
        question=column("question"),
        answer=column("answer"),
        person=np.arange(len(rows), dtype=np.int32) // QUESTIONS_PER_AUTHOR
        if whole
        else np.full(len(rows), -1, np.int32),
        paraphrased_question=column("paraphrased_question") if perturbed else None,
        paraphrased_answer=column("paraphrased_answer") if perturbed else None,
        wrong_answers=None if wrong is None else _equally_many(wrong, places),
    )


def _equally_many(answers: list, places: list[str]) -> tuple[tuple[str, ...], ...]:
    for some, place in zip(answers, places, strict=True):
        if not isinstance(some, list) or not some or not all(isinstance(one, str) for one in some):
            raise ValueError(f"{place}: got {some!r} as perturbed_answer, expected a list of texts")
        if len(some) != len(answers[0]):
            raise ValueError(f"{place}: got {len(some)} wrong answers, expected {len(answers[0])} as in the first row")
    return tuple(tuple(some) for some in answers)
