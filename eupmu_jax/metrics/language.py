r"""Metrics of TOFU and of memorisation, from the losses and greedy predictions of answer tokens.

The metrics of TOFU (Maini et al. 2024, arXiv 2401.06121) use :math:`l = L / |y|`, the mean loss per token of an answer:
`objectives.language.sequence_nll` over `answer_lengths`. Everything is computed on the host, in float64.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

# Added to denominators, as in TOFU, so that an impossible answer causes no division by zero.
OFFSET = 1e-10


class ForgetQuality(NamedTuple):
    """A p-value and its decimal logarithm, which is -inf where the p-value underflows."""

    p_value: float
    log10: float


def answer_probability(nll: ArrayLike, lengths: ArrayLike) -> np.ndarray:
    r"""Probability of each answer, normalised by its length: :math:`p^{1/|y|} = e^{-L/|y|}`, `(n,)` in [0, 1].

    Args:
      nll: Loss of each answer, summed over its tokens, `(n,)`.
      lengths: Number of tokens of each answer, `(n,)`.

    Raises:
      ValueError: If the shapes differ, for an answer without tokens, or a loss that is NaN or negative.

    >>> answer_probability([np.log(8.0)], [3]).round(6).tolist()
    [0.5]
    """
    losses, counts = _losses("nll", nll), np.asarray(lengths)
    if counts.shape != losses.shape:
        raise ValueError(f"lengths: got shape {counts.shape}, expected that of nll, {losses.shape}")
    if not (counts > 0).all():
        raise ValueError(f"lengths: got {counts.min()}, expected at least one token in each answer")
    return np.exp(-losses / counts)


def choice_probability(correct: ArrayLike, wrong: ArrayLike) -> np.ndarray:
    r"""Probability of the right answer among the choices, as TOFU uses it for real authors and world facts.

    .. math:: p_i / (p_i + \textstyle\sum_j \bar p_{ij} + 10^{-10})

    Args:
      correct: `answer_probability` of the right answers, `(n,)`.
      wrong: `answer_probability` of k wrong answers for each, `(n, k)`.

    Raises:
      ValueError: For other shapes, or values outside [0, 1].

    >>> choice_probability([0.5], [[0.25, 0.25]]).round(6).tolist()
    [0.5]
    """
    right, others = np.asarray(correct, np.float64), np.asarray(wrong, np.float64)
    _check_choices("wrong", right, others)
    for name, values in (("correct", right), ("wrong", others)):
        if not ((values >= 0) & (values <= 1)).all():
            raise ValueError(f"{name}: got values outside of [0, 1], expected probabilities")
    return right / (right + others.sum(axis=1) + OFFSET)


def truth_ratio(paraphrased: ArrayLike, perturbed: ArrayLike) -> np.ndarray:
    r"""How likely wrong answers are relative to the paraphrased right one, `(n,)`, at least 0.

    .. math:: R_i = e^{-\operatorname{mean}_j l(\text{wrong}_{ij})} / (e^{-l(\text{paraphrased}_i)} + 10^{-10})

    The numerator is a geometric mean over the wrong answers. Near 1 the model does not distinguish right from wrong;
    near 0 it knows the truth.

    Args:
      paraphrased: Mean loss per token of the right answers, `(n,)`.
      perturbed: Mean loss per token of k wrong answers for each, `(n, k)`; TOFU has 5.

    Raises:
      ValueError: For other shapes, or losses that are NaN or negative.

    >>> truth_ratio([1.0], [[2.0, 4.0]]).round(4).tolist()
    [0.1353]
    """
    right, wrong = _losses("paraphrased", paraphrased), _losses("perturbed", perturbed)
    _check_choices("perturbed", right, wrong)
    return np.exp(-wrong.mean(axis=1)) / (np.exp(-right) + OFFSET)


def truth_score(ratios: ArrayLike, *, forgotten: bool) -> float:
    r"""Mean score of truth ratios, in [0, 1].

    .. math:: \min(R, 1/R) \;\text{on the forget set}, \qquad \max(0, 1 - R) \;\text{on all others}

    1 is best on both: the model does not distinguish right from wrong on the forget set, and knows the truth elsewhere.

    Args:
      ratios: `truth_ratio`, `(n,)`.
      forgotten: Whether the ratios are from the forget set.

    Raises:
      ValueError: If there are no ratios, or ratios that are NaN or negative.

    >>> truth_score([0.5, 2.0], forgotten=True), truth_score([0.5, 2.0], forgotten=False)
    (0.5, 0.25)
    """
    values = _losses("ratios", ratios)
    if not forgotten:
        return float(np.mean(np.maximum(0, 1 - values)))
    large = values > 1
    return float(np.mean(np.where(large, 1 / np.where(large, values, 1), values)))


def forget_quality(ratios: ArrayLike, retrained_ratios: ArrayLike) -> ForgetQuality:
    """p-value of the two-sided Kolmogorov-Smirnov test between truth ratios of two models on the forget set.

    It is large if the unlearned model cannot be told apart from the retrained one. It depends on the number of
    examples: the test has little power with 40, and much with 400. Report the logarithm, and compare only values from
    equal numbers of examples.

    Args:
      ratios: `truth_ratio` of the unlearned model, `(n,)`.
      retrained_ratios: `truth_ratio` of the retrained model, `(m,)`.

    Raises:
      ValueError: If there are no ratios, ratios that are NaN or negative, or more than one for an example.

    >>> round(forget_quality([0.1, 0.2, 0.3], [0.7, 0.8, 0.9]).log10, 6)
    -1.0
    """
    sets = _losses("ratios", ratios), _losses("retrained_ratios", retrained_ratios)
    for name, values in zip(("ratios", "retrained_ratios"), sets, strict=True):
        if values.ndim != 1:
            raise ValueError(f"{name}: got shape {values.shape}, expected one for each example, (n,)")
    p_value = float(stats.ks_2samp(*sets).pvalue)
    return ForgetQuality(p_value, float(np.log10(p_value)) if p_value > 0 else -np.inf)


def model_utility(figures: Iterable[float]) -> float:
    """Harmonic mean of TOFU's nine figures: probability, ROUGE-L recall, truth score on retain set, authors and facts.

    It is 0 if any figure is 0.

    Raises:
      ValueError: If there are no figures, or figures outside [0, 1].

    >>> model_utility([0.5, 1.0]), model_utility([0.0, 1.0])
    (0.6666666666666666, 0.0)
    """
    if isinstance(figures, Mapping):
        raise ValueError(f"figures: got names {', '.join(map(str, figures))}, expected only the numbers")
    if not isinstance(figures, Iterable):
        raise ValueError(f"figures: got {figures!r}, expected several numbers")
    values = _losses("figures", list(figures))
    if (values > 1).any():
        raise ValueError(f"figures: got {values.max():.4g}, expected numbers in [0, 1]")
    return 0.0 if (values == 0).any() else float(stats.hmean(values))


def exact_memorisation(predicted: ArrayLike, targets: ArrayLike, mask: ArrayLike) -> np.ndarray:
    """Fraction of the tokens of each answer that the model predicts from the true tokens before them, `(n,)`.

    It equals 1 minus the error of `tasks.language` (Tirumala et al. 2022, arXiv 2205.10770).

    Args:
      predicted: Most likely token at every position, `(n, T)` ints.
      targets: True tokens, `(n, T)`.
      mask: Which of them belong to the answer, `(n, T)`.

    Raises:
      ValueError: If the shapes differ, or for an answer without tokens.

    >>> exact_memorisation([[5, 1, 2, 3]], [[0, 1, 9, 3]], [[0, 1, 1, 1]]).round(4).tolist()
    [0.6667]
    """
    right, answer = _right(predicted, targets, mask)
    return (right & answer).sum(axis=1) / answer.sum(axis=1)


def extraction_strength(predicted: ArrayLike, targets: ArrayLike, mask: ArrayLike) -> np.ndarray:
    r"""How short a prefix of an answer suffices for the model to produce all the rest, `(n,)` in [0, 1].

    .. math:: 1 - \frac1{|y|} \min\{k : \text{greedy decoding after } y_{\le k} \text{ gives } y_{> k}\}

    (Carlini et al. 2021, arXiv 2012.07805; Wang et al. 2025, arXiv 2502.19301.) Greedy decoding repeats the rest
    exactly if each of its tokens is the most likely one after the true ones, so one forward pass is enough: k is the
    position of the last error. An answer whose last token is wrong gets 0; a published implementation gives 1 / |y|.

    Args:
      predicted, targets, mask: As in `exact_memorisation`.

    Raises:
      ValueError: As in `exact_memorisation`.

    >>> extraction_strength([[5, 1, 2, 3]], [[0, 9, 2, 3]], [[0, 1, 1, 1]]).round(4).tolist()
    [0.6667]
    """
    right, answer = _right(predicted, targets, mask)
    lengths = answer.sum(axis=1)
    # Number of answer tokens after each position.
    behind = lengths[:, None] - np.cumsum(answer, axis=1)
    return np.min(np.where(answer & ~right, behind, lengths[:, None]), axis=1) / lengths


def _right(predicted, targets, mask):
    predicted, targets, mask = np.asarray(predicted), np.asarray(targets), np.asarray(mask).astype(bool)
    for name, values in (("predicted", predicted), ("mask", mask)):
        if values.shape != targets.shape or targets.ndim != 2:
            raise ValueError(
                f"{name}: got shape {values.shape} for targets of {targets.shape}, expected (n, T) for both"
            )
    if not (present := mask.any(axis=1)).all():
        raise ValueError(f"mask: got no token in answer {np.argmin(present)}, expected at least one in each")
    return predicted == targets, mask


def _losses(name, values):
    values = np.asarray(values, np.float64)
    if not values.size:
        raise ValueError(f"{name}: got no values, expected at least one")
    if not (values >= 0).all():
        raise ValueError(f"{name}: got values that are negative or NaN, expected numbers of at least 0")
    return values


def _check_choices(name, one, many):
    if one.ndim != 1 or many.ndim != 2 or len(many) != len(one) or not many.shape[1]:
        raise ValueError(f"{name}: got shape {many.shape} for right answers of {one.shape}, expected (n, k) and (n,)")
