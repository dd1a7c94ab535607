"""ROUGE-L of generated text, and the figures of MUSE that are made of it (Shi et al. 2024, arXiv 2407.06460).

Needs the package rouge-score, of the extra `language`.
"""

import logging
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

logger = logging.getLogger("eupmu_jax")
_KEPT = re.compile("[a-z0-9]")
# Where an answer to a few-shot prompt ends: at a blank line, or where the model goes on to ask.
_END = re.compile(r"\n\s*\n|\nQuestion|Question:")


class RougeL(NamedTuple):
    """Of each pair, `(n,)`: the longest common subsequence of words over those of the reference, and F1."""

    recall: np.ndarray
    f1: np.ndarray


def rouge_l(generated: Sequence[str], references: Sequence[str], *, stem: bool = True) -> RougeL:
    """ROUGE-L of words (Lin 2004).

    TOFU reports the mean recall of stemmed words of greedy answers of at most 200 tokens, MUSE means of F1 without
    stemming. Both take the words of rouge-score, which are of the letters a to z and of digits alone: an accent parts a
    word, and a text in another script has none. A text without words has 0; of such references a warning is given, as
    that is no sign of forgetting.

    Args:
      generated: Texts of the model.
      references: True texts, in the same order.
      stem: Whether words count as equal that have one stem.

    Raises:
      ValueError: For lists of other lengths, or none.
      ImportError: Without rouge-score.
    """
    if len(generated) != len(references) or not len(generated):
        raise ValueError(
            f"references: got {len(references)} for {len(generated)} generated texts, expected one for each, and some"
        )
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError("ROUGE-L needs the package rouge-score: install eupmu-jax[language]") from error
    scorer = RougeScorer(["rougeL"], use_stemmer=stem)
    if wordless := [true for true in references if any(map(str.isalpha, true)) and not _KEPT.search(true.lower())]:
        logger.warning(
            "references: %d of %d have no letter from a to z and no digit, so their ROUGE-L is always 0; got %r",
            len(wordless),
            len(references),
            wordless[0][:40],
        )
    scores = [scorer.score(true, text)["rougeL"] for text, true in zip(generated, references, strict=True)]
    return RougeL(*(np.array([getattr(score, name) for score in scores], float) for name in ("recall", "fmeasure")))


def verbmem(continuations: Sequence[str], references: Sequence[str]) -> float:
    """Verbatim memorisation: mean ROUGE-L F1 of continuations of forgotten passages, in [0, 1].

    The aim is the retrained model's value, not 0. MUSE prompts with the beginning of a passage, generates at most 128
    tokens, and cuts the references to 128 as well; words are not stemmed.

    Args:
      continuations: What the model goes on with.
      references: How the passages go on.

    Raises:
      ValueError, ImportError: As in `rouge_l`.
    """
    return float(np.mean(rouge_l(continuations, references, stem=False).f1))


def knowmem(answers: Sequence[str], references: Sequence[str]) -> float:
    """Memorisation of knowledge: mean ROUGE-L F1 of answers to questions, in [0, 1], on the forget or the retain set.

    MUSE asks with a few-shot prompt and generates at most 32 tokens. What follows a blank line or the next question
    is no part of an answer.

    Args:
      answers: What the model generates.
      references: The true answers.

    Raises:
      ValueError, ImportError: As in `rouge_l`.
    """
    return verbmem([shortened(answer) for answer in answers], references)


def shortened(answer: str) -> str:
    r"""An answer up to a blank line, or to where the model asks the next question.

    >>> shortened("in 1881\nQuestion: Where?"), shortened("in 1881\n\nYes"), shortened("Question Time on television")
    ('in 1881', 'in 1881', 'Question Time on television')
    """
    return _END.split(answer, maxsplit=1)[0].strip()
