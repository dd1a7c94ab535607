"""How a language model answers questions: TOFU's metrics, from the losses of given answers and from its own answers."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import chex
import numpy as np

from eupmu_jax.benchmark.reading import continued, token_by_token
from eupmu_jax.data import questions
from eupmu_jax.data.questions import Questions
from eupmu_jax.metrics import language as metrics
from eupmu_jax.metrics.rouge import rouge_l
from eupmu_jax.metrics.text_membership import min_k
from eupmu_jax.models.language import LanguageModel, Tokenizer
from eupmu_jax.tasks import Examples


class Respondent(NamedTuple):
    """A language model and how it is prompted.

    Attributes:
      language, tokenizer: The model, of which only the functions are used.
      template: As for `questions.tokenized`.
      length: Tokens of a row with the right answer, in training too.
      longer: Tokens of a row with a paraphrased or a wrong answer.
      answer: Maximum number of tokens of a generated answer.
      batch: Rows in a forward pass.
    """

    language: LanguageModel
    tokenizer: Tokenizer
    template: str
    length: int
    longer: int
    answer: int
    batch: int = 32


def fitting(respondent: Respondent, part: Questions) -> Questions:
    """The questions whose right, paraphrased and wrong answers all fit into their rows."""

    def fits(row, answer, room):
        text = respondent.template.replace("{question}", part.question[row]).replace("{answer}", answer)
        # The end token takes one more place.
        return len(respondent.tokenizer.encode(text)) < room

    def all_fit(row):
        wrong = () if part.wrong_answers is None else part.wrong_answers[row]
        others = (_right(part)[row], *wrong)
        return fits(row, part.answer[row], respondent.length) and all(
            fits(row, one, respondent.longer) for one in others
        )

    return part.take([row for row in range(len(part.question)) if all_fit(row)])


def check(respondent: Respondent, part: Questions) -> None:
    """Raises `ValueError` for rows beyond the model's context, and for a question that does not fit with an answer.

    Both the given answers and the generated one have to fit. Evaluation requires questions with wrong answers.
    """
    context = respondent.language.context
    for name in ("length", "longer"):
        if context is not None and getattr(respondent, name) > context:
            raise ValueError(
                f"{name}: got rows of {getattr(respondent, name)} tokens, expected at most the model's context of "
                f"{context}"
            )
    encoded(respondent, part)
    for others in (_right(part), *_wrong(part)):
        encoded(respondent, part, others, respondent.longer)
    longest = max(map(len, _prompts(respondent, part)))
    if context is not None and longest + respondent.answer > context:
        raise ValueError(
            f"answer: got {respondent.answer} tokens after a prompt of {longest}, expected no more than the model's "
            f"context of {context}"
        )


def encoded(respondent: Respondent, part: Questions, answers: Sequence[str] | None = None, length: int = 0) -> dict:
    """The batch of these questions with their answers, or with other answers in rows of another length.

    Raises:
      ValueError: For no questions, such as those that `fitting` leaves if `length` is too small for all, and as in
        `questions.tokenized`.
    """
    if not part.question:
        raise ValueError("part: got no questions, expected at least one")
    return questions.tokenized(
        part.question,
        part.answer if answers is None else answers,
        respondent.tokenizer.encode,
        length=length or respondent.length,
        end=respondent.tokenizer.end,
        template=respondent.template,
    )


def examples(batch: dict[str, np.ndarray]) -> Examples:
    """The whole batch as `Examples`, for `unlearn` and `fit`."""
    return Examples(batch, np.arange(len(batch["tokens"])))


def told(respondent: Respondent, params: chex.ArrayTree, batch: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The loss of each answer, its length, and the most likely token at every position but the first."""
    nll, predicted = token_by_token(respondent.language.apply, params, batch["tokens"], respondent.batch)
    mask = batch["mask"][:, 1:]
    return np.where(mask, nll, 0).sum(axis=1), mask.sum(axis=1), predicted


def error(respondent: Respondent, params: chex.ArrayTree, part: Questions) -> float:
    """Mean share of an answer's tokens that the model does not predict, which is the error of `tasks.language`."""
    batch = encoded(respondent, part)
    return _error(told(respondent, params, batch)[2], batch)


def _error(predicted, batch):
    return 1 - float(np.mean(metrics.exact_memorisation(predicted, *_targets(batch))))


def _targets(batch):
    return batch["tokens"][:, 1:], batch["mask"][:, 1:]


def answers(respondent: Respondent, params: chex.ArrayTree, part: Questions) -> list[str]:
    """The model's own answers, by greedy decoding."""
    language, tokenizer, prompts = respondent.language, respondent.tokenizer, _prompts(respondent, part)
    made = continued(language, tokenizer, params, prompts, respondent.answer, respondent.batch)
    return [text.strip() for text in made]


def _prompts(respondent, part):
    before = respondent.template.removesuffix("{answer}").rstrip(" ")
    return [respondent.tokenizer.encode(before.replace("{question}", question)) for question in part.question]


def probability(respondent: Respondent, params: chex.ArrayTree, part: Questions) -> float:
    """Mean length-normalised probability of the right answers."""
    return float(np.mean(metrics.answer_probability(*told(respondent, params, encoded(respondent, part))[:2])))


def rouge(respondent: Respondent, params: chex.ArrayTree, part: Questions) -> float:
    """Mean ROUGE-L recall of the model's own answers."""
    return float(np.mean(rouge_l(answers(respondent, params, part), part.answer).recall))


def membership(respondent: Respondent, params: chex.ArrayTree, part: Questions) -> np.ndarray:
    """Min-40 % of the tokens of each answer, `(n,)`; higher for those that were trained on."""
    batch = encoded(respondent, part)
    nll, _ = token_by_token(respondent.language.apply, params, batch["tokens"], respondent.batch)
    return min_k(nll, batch["mask"][:, 1:])


def _right(part):
    return part.answer if part.paraphrased_answer is None else part.paraphrased_answer


def _wrong(part):
    """The first wrong answers of all questions, then the second ones, and so on."""
    counts = {len(some) for some in part.wrong_answers or ((),)}
    if len(counts) > 1 or 0 in counts:
        raise ValueError(
            f"wrong_answers: got {' or '.join(map(str, sorted(counts)))} for a question, expected the same "
            "number for each, at least one"
        )
    return list(zip(*part.wrong_answers, strict=True))


def truth(respondent: Respondent, params: chex.ArrayTree, part: Questions) -> tuple[np.ndarray, np.ndarray]:
    """TOFU's truth ratio of each question, and the probability of the right answer among the choices.

    The right answer is the paraphrased one, where there is one.

    Raises:
      ValueError: Without wrong answers, or if questions have different numbers of them.
    """

    def mean(answers):
        nll, lengths, _ = told(respondent, params, encoded(respondent, part, answers, respondent.longer))
        return nll / lengths

    right = mean(_right(part))
    wrong = np.stack([mean(one) for one in _wrong(part)], axis=1)
    return metrics.truth_ratio(right, wrong), metrics.choice_probability(np.exp(-right), np.exp(-wrong))


def truth_ratios(respondent: Respondent, params: chex.ArrayTree, part: Questions) -> list[float]:
    """TOFU's truth ratio of each question with the four digits of a row, for comparison with those of another row."""
    return [float(f"{ratio:.4g}") for ratio in truth(respondent, params, part)[0]]


def judge(
    respondent: Respondent,
    params: chex.ArrayTree,
    forget: Questions,
    retain: Questions,
    others: Mapping[str, Questions],
) -> dict[str, Any]:
    """Evaluates a model as TOFU does.

    Args:
      respondent, params: The model.
      forget, retain: Questions with wrong answers.
      others: Sets of questions that were never trained on, with wrong answers: world facts, real authors.

    Returns:
      For the forget set: mean `probability` of the answers, `rouge` (recall of the model's own answers), `extraction`
      strength, `exact_memorisation`, and the `truth_ratios` of all questions, from which `metrics.forget_quality`
      computes the forget quality with those of the retrained model. `utility`, the harmonic mean of its `parts`:
      probability, ROUGE-L recall and truth score of the retain set and of each other set, whose probability is that
      among the choices. `error` of the forget and the retain set. All but truth ratios are fractions in [0, 1].

    The end token is the last token of an answer. The code of open-unlearning counts it in losses too, but neither in
    exact memorisation nor in extraction strength, which here is 0 for an answer that the model would not end.
    """
    batch = encoded(respondent, forget)
    nll, lengths, predicted = told(respondent, params, batch)
    missed = _error(predicted, batch)
    parts: dict[str, float] = {}
    for name, part in {"retain": retain, **others}.items():
        ratios, choice = truth(respondent, params, part)
        chosen = probability(respondent, params, part) if name == "retain" else float(np.mean(choice))
        score = metrics.truth_score(ratios, forgotten=False)
        parts |= {
            f"{name} probability": chosen,
            f"{name} rouge": rouge(respondent, params, part),
            f"{name} truth": score,
        }
    return {
        "probability": float(np.mean(metrics.answer_probability(nll, lengths))),
        "rouge": rouge(respondent, params, forget),
        "extraction": float(np.mean(metrics.extraction_strength(predicted, *_targets(batch)))),
        "truth_ratios": truth_ratios(respondent, params, forget),
        "exact_memorisation": 1 - missed,
        "error": {"forget": missed, "retain": error(respondent, params, retain)},
        "utility": metrics.model_utility(parts.values()),
        "parts": parts,
    }
