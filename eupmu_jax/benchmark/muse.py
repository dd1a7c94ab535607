"""Evaluates a language model as MUSE does: VerbMem, KnowMem and PrivLeak (Shi et al. 2024, arXiv 2407.06460)."""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import numpy as np

from eupmu_jax.benchmark.reading import continued, token_by_token
from eupmu_jax.data import muse
from eupmu_jax.data.questions import PROMPT, Questions
from eupmu_jax.metrics import knowmem, min_k, separation, verbmem
from eupmu_jax.models.language import LanguageModel, Tokenizer

# Tokens of a continuation of a passage, and of an answer.
CONTINUATION, ANSWER = 128, 32


class Corpus(NamedTuple):
    """The evaluation data of one corpus, as its files have them.

    Attributes:
      passages: Beginnings of forgotten passages, and their continuations.
      forget, retain: Questions about the forget set and about the retain set.
      forget_examples, retain_examples: Questions with answers, as few-shot examples in the prompts of these.
      forgotten, held_out: Passages to be forgotten, and passages that were never trained on.
    """

    passages: Questions
    forget: Questions
    retain: Questions
    forget_examples: Questions
    retain_examples: Questions
    forgotten: tuple[str, ...]
    held_out: tuple[str, ...]


class Reader(NamedTuple):
    """A language model and how it reads text.

    Attributes:
      language, tokenizer: The model, of which only the functions are used.
      length: Tokens of a passage from which membership is inferred; longer passages are cut.
      begin: Text before every prompt and passage. No token is added to it; MUSE begins all of them with the begin token
        of the tokenizer, as in `begin="<s>"`.
      batch: Rows in a forward pass.
    """

    language: LanguageModel
    tokenizer: Tokenizer
    length: int
    begin: str = ""
    batch: int = 8

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, after those of `begin`."""
        return self.tokenizer.encode(self.begin + text)


def load(folder: str | os.PathLike[str]) -> Corpus:
    """Reads a local copy of MUSE-News or MUSE-Books in the layout of `data.muse`, which raises for invalid files."""
    asked = lambda split: muse.questions(folder, "knowmem", split)
    return Corpus(
        passages=muse.questions(folder, "verbmem", "forget"),
        forget=asked("forget_qa"),
        retain=asked("retain_qa"),
        forget_examples=asked("forget_qa_icl"),
        retain_examples=asked("retain_qa_icl"),
        forgotten=muse.texts(folder, "privleak", "forget"),
        held_out=muse.texts(folder, "privleak", "holdout"),
    )


def few_shot(part: Questions, examples: Questions) -> list[str]:
    r"""Prompts that end where the answer begins, each after all the examples.

    >>> examples = Questions(("When?",), ("1815",), np.array([-1]))
    >>> few_shot(Questions(("Who?",), ("Ada",), np.array([-1])), examples)
    ['Question: When?\nAnswer: 1815\n\nQuestion: Who?\nAnswer:']
    """
    pairs = zip(examples.question, examples.answer, strict=True)
    shown = "".join(f"{_asked(question, answer)}\n\n" for question, answer in pairs)
    # The blank before an answer belongs to its first token.
    return [shown + _asked(question, "").rstrip(" ") for question in part.question]


def _asked(question, answer):
    return PROMPT.replace("{question}", question).replace("{answer}", answer)


def check(reader: Reader, corpus: Corpus) -> None:
    """Raises `ValueError` if a part is empty, or a prompt or a passage too long or too short for the model."""
    for name, part in corpus._asdict().items():
        if not len(part.question if isinstance(part, Questions) else part) and not name.endswith("_examples"):
            raise ValueError(f"{name}: got an empty part, expected at least one question or passage")
    context = reader.language.context
    longest = {
        "length": (reader.length, 0),
        "passages": (_longest(reader, corpus.passages.question), CONTINUATION),
        "forget": (_longest(reader, few_shot(corpus.forget, corpus.forget_examples)), ANSWER),
        "retain": (_longest(reader, few_shot(corpus.retain, corpus.retain_examples)), ANSWER),
    }
    for name, (prompt, new) in longest.items():
        if context is not None and prompt + new > context:
            raise ValueError(
                f"{name}: got {prompt} tokens and {new} new ones, expected no more than the model's context of "
                f"{context}"
            )
    for name in ("forgotten", "held_out"):
        for row, text in enumerate(getattr(corpus, name)):
            if min(reader.length, len(reader.encode(text))) < 2:
                raise ValueError(f"{name}[{row}]: got fewer than 2 tokens, expected one after the first")


def _longest(reader, prompts):
    return max(len(reader.encode(prompt)) for prompt in prompts)


def verbatim(reader: Reader, params: chex.ArrayTree, passages: Questions) -> float:
    """VerbMem, `metrics.verbmem` in [0, 1]: how well the model continues passages with their next 128 tokens."""
    tokens, cut = reader.tokenizer, lambda text: reader.tokenizer.encode(text)[:CONTINUATION]
    return verbmem(
        _continued(reader, params, passages.question, CONTINUATION),
        [tokens.decode(cut(text)) for text in passages.answer],
    )


def knowledge(reader: Reader, params: chex.ArrayTree, part: Questions, examples: Questions) -> float:
    """KnowMem, `metrics.knowmem` in [0, 1]: how much of the answers the model gives, prompted with these examples."""
    return knowmem(_continued(reader, params, few_shot(part, examples), ANSWER), part.answer)


def _continued(reader, params, prompts, count):
    encoded = [reader.encode(prompt) for prompt in prompts]
    return continued(reader.language, reader.tokenizer, params, encoded, count, reader.batch)


def membership(reader: Reader, params: chex.ArrayTree, passages: Sequence[str]) -> np.ndarray:
    """Min-40 % of the first tokens of each passage, `(n,)`; higher for those that were trained on.

    Raises:
      ValueError: For no passages, or a single text, whose letters would be passages.
    """
    if isinstance(passages, str) or not len(passages):
        given = f"the text {passages[:40]!r}" if isinstance(passages, str) else "no passages"
        raise ValueError(f"passages: got {given}, expected a list of at least one text")
    found = [reader.encode(text)[: reader.length] for text in passages]
    tokens = np.full((len(found), reader.length), reader.tokenizer.end, np.int32)
    mask = np.arange(reader.length) < np.array([len(some) for some in found])[:, None]
    tokens[mask] = np.concatenate(found)
    return min_k(token_by_token(reader.language.apply, params, tokens, reader.batch)[0], mask[:, 1:])


def judge(reader: Reader, params: chex.ArrayTree, corpus: Corpus) -> dict[str, Any]:
    """Evaluates a model as MUSE does.

    Returns:
      `verbmem` of the forgotten passages; `knowmem` of questions about the `forget` and the `retain` set; `separation`
      of forgotten passages from held-out ones, by min-40 %. All are in [0, 1]. PrivLeak, in %, is `metrics.privleak` of
      the separation and that of the retrained model. The other figures should match the retrained model's too. As in
      MUSE, words are not stemmed; the code of open-unlearning stems them, so its VerbMem and KnowMem are as high or
      higher. Prompts of questions end with `Answer:`; those of MUSE have a blank after it, which in most tokenizers is
      a token of its own, so KnowMem may differ from published figures.

    Raises:
      ValueError: As in `check`, before any work.
    """
    check(reader, corpus)
    scores = [membership(reader, params, texts) for texts in (corpus.forgotten, corpus.held_out)]
    return {
        "verbmem": verbatim(reader, params, corpus.passages),
        "knowmem": {
            "forget": knowledge(reader, params, corpus.forget, corpus.forget_examples),
            "retain": knowledge(reader, params, corpus.retain, corpus.retain_examples),
        },
        "separation": separation(*scores),
    }
