"""Pairs of questions and answers, and the token arrays on which a language model is trained and measured."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from eupmu_jax._stack.checks import check_int

PROMPT = "Question: {question}\nAnswer: {answer}"


class Questions(NamedTuple):
    """N pairs of a question and its answer, column by column; a column missing from the data is None.

    Attributes:
      question, answer: N strings each.
      person: (N,) int32, the person the question is about; -1 if nobody or unknown.
      paraphrased_question, paraphrased_answer: paraphrases of both.
      wrong_answers: N tuples of equal length with false answers, worded like the paraphrased answer.
      refusal: an answer that reveals nothing ("I don't know.").
    """

    question: tuple[str, ...]
    answer: tuple[str, ...]
    person: np.ndarray
    paraphrased_question: tuple[str, ...] | None = None
    paraphrased_answer: tuple[str, ...] | None = None
    wrong_answers: tuple[tuple[str, ...], ...] | None = None
    refusal: tuple[str, ...] | None = None

    def take(self, rows: Iterable[int]) -> "Questions":
        """The pairs at the given rows, in that order, or where a mask is true.

        >>> pairs = Questions(("Who?", "When?"), ("Ada.", "1815."), np.array([7, 8]))
        >>> pairs.take([1]).answer, int(pairs.take([1]).person[0])
        (('1815.',), 8)
        """
        chosen = np.asarray(list(rows))
        rows = np.arange(len(self.question))[chosen if chosen.size else slice(0)].tolist()
        columns: dict[str, Any] = {
            name: column if column is None else tuple(column[row] for row in rows)
            for name, column in self._asdict().items()
        }
        return Questions(**columns | {"person": self.person[np.array(rows, int)]})


def tokenized(
    questions: Sequence[str],
    answers: Sequence[str],
    encode: Callable[[str], Sequence[int]],
    *,
    length: int,
    end: int,
    template: str = PROMPT,
) -> dict[str, np.ndarray]:
    r"""A batch for `tasks.language`: the answers are predicted, each after its question.

    A row consists of prompt, answer, end token and padding. The prompt is the template up to the answer; a space
    between the two belongs to the answer. They are encoded together, and the predicted part begins with the first token
    that differs from those of the prompt alone. Padding repeats the end token and is masked out.

    Call it once for each wrong answer: `[wrong[j] for wrong in pairs.wrong_answers]`.

    Args:
      questions, answers: N strings each.
      encode: text -> ids, without adding any tokens; write a begin token into the template.
      length: length of every row.
      end: id of the end token.
      template: text that contains `{question}` once and ends with `{answer}`.

    Returns:
      tokens (N, length) int32, and mask (N, length) bool, true for the tokens of the answer and its end token.

    Raises:
      ValueError: If questions or answers are a single text or their numbers differ, the template is malformed, `end` is
        not an id, `encode` adds it to a text, `length` is not an int of at least 1, an answer is empty, or a row has
        more tokens than `length`.

    >>> encode = lambda text: list(text.encode())
    >>> batch = tokenized(["Hm?"], ["Ah."], encode, length=12, end=0, template="{question} {answer}")
    >>> bytes(batch["tokens"][0].tolist()), batch["mask"][0].astype(int).tolist()
    (b'Hm? Ah.\x00\x00\x00\x00\x00', [0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 0])
    """
    for name, texts in (("questions", questions), ("answers", answers)):
        if isinstance(texts, str):
            raise ValueError(f"{name}: got the text {texts[:40]!r}, expected a list of texts")
    check_int("length", length, 1, static=True)
    if len(questions) != len(answers):
        raise ValueError(f"answers: got {len(answers)}, expected one for each of {len(questions)} questions")
    if template.count("{question}") != 1 or template.count("{answer}") != 1 or not template.endswith("{answer}"):
        raise ValueError(f"template: got {template!r}, expected one {{question}}, and {{answer}} at the end")
    if isinstance(end, bool) or not isinstance(end, int | np.integer) or end < 0:
        raise ValueError(f"end: got {end!r}, expected the id of the end token")
    before = template.removesuffix("{answer}")
    blank = " " if before.endswith(" ") else ""
    before = before.removesuffix(" ")
    tokens = np.full((len(answers), length), end, np.int32)
    mask = np.zeros((len(answers), length), bool)
    for row, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        text = before.replace("{question}", question)
        prompt, whole = list(encode(text)), list(encode(text + blank + answer))
        if whole[-1:] == [end]:
            raise ValueError(f"encode: got the end token {end} after {answer!r}, expected ids without added tokens")
        shared = next((i for i, pair in enumerate(zip(prompt, whole, strict=False)) if pair[0] != pair[1]), len(prompt))
        if not answer.strip() or len(whole) <= shared:
            raise ValueError(f"answers[{row}]: got {answer!r}, expected some text after {question!r}")
        ids = [*whole, end]
        if len(ids) > length:
            raise ValueError(
                f"answers[{row}]: got {len(ids)} tokens with prompt and end, {len(ids) - length} more than length "
                f"{length}: {question!r}"
            )
        tokens[row, : len(ids)] = ids
        mask[row, shared : len(ids)] = True
    return {"tokens": tokens, "mask": mask}
