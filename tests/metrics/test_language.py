"""Figures of TOFU and of memorisation, against plain loops and numbers worked out by hand."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import comb

from eupmu_jax import metrics, tasks

RNG = np.random.default_rng(0)


def test_the_probability_of_an_answer_of_equally_likely_tokens_does_not_depend_on_its_length():
    lengths = np.array([1, 4, 50])
    np.testing.assert_allclose(metrics.answer_probability(-lengths * np.log(0.3), lengths), 0.3)


def test_choice_probabilities_are_normalised_over_the_choices():
    correct, wrong = RNG.uniform(size=7), RNG.uniform(size=(7, 5))
    expected = [c / (c + sum(w)) for c, w in zip(correct, wrong, strict=True)]
    np.testing.assert_allclose(metrics.choice_probability(correct, wrong), expected, rtol=1e-8)
    assert metrics.choice_probability([0.0], [[0.0]]) == 0


def test_truth_ratio_is_a_geometric_mean_over_a_probability():
    right, wrong = RNG.uniform(0, 4, size=9), RNG.uniform(0, 4, size=(9, 5))
    expected = [np.prod(np.exp(-w)) ** 0.2 / np.exp(-r) for r, w in zip(right, wrong, strict=True)]
    np.testing.assert_allclose(metrics.truth_ratio(right, wrong), expected, rtol=1e-7)
    # The geometric mean of probabilities 1/8 and 1/2 is 1/4; the arithmetic one would give 0.3125 / 0.5.
    np.testing.assert_allclose(metrics.truth_ratio([np.log(2)], [[np.log(8), np.log(2)]]), 0.5, rtol=1e-8)


def test_truth_scores_by_hand():
    ratios = [0.0, 0.25, 1.0, 4.0, 1e12]
    assert metrics.truth_score(ratios, forgotten=True) == pytest.approx((0 + 0.25 + 1 + 0.25 + 0) / 5)
    assert metrics.truth_score(ratios, forgotten=False) == pytest.approx((1 + 0.75) / 5)


@given(st.lists(st.floats(0, 1e300), min_size=1, max_size=9))
@settings(max_examples=50, deadline=None)
def test_truth_scores_lie_between_0_and_1(ratios):
    for forgotten in (True, False):
        assert 0 <= metrics.truth_score(ratios, forgotten=forgotten) <= 1


def test_forget_quality_is_the_exact_p_value_of_separated_samples():
    # Of the (2n choose n) orders of n and n values, two are the most extreme.
    for n in (5, 40, 400):
        found = metrics.forget_quality(np.linspace(0, 1, n), np.linspace(2, 3, n))
        np.testing.assert_allclose(found.log10, np.log10(2) - np.log10(comb(2 * n, n)), rtol=1e-6)
    same = RNG.uniform(size=40)
    assert metrics.forget_quality(same, same) == (1.0, 0.0)


def test_forget_quality_is_two_sided_and_depends_only_on_the_order():
    one, other = RNG.uniform(0.1, 1, size=30), RNG.uniform(0.3, 2, size=40)
    found = metrics.forget_quality(one, other)
    np.testing.assert_allclose(metrics.forget_quality(other, one), found, rtol=1e-12)
    np.testing.assert_allclose(metrics.forget_quality(1 / one, 1 / other), found, rtol=1e-12)


def test_model_utility_is_a_harmonic_mean():
    figures = RNG.uniform(0.1, 1, size=9)
    assert metrics.model_utility(figures) == pytest.approx(9 / sum(1 / figures))
    assert metrics.model_utility([0.5] * 9) == pytest.approx(0.5)
    assert metrics.model_utility([*figures[:8], 0.0]) == 0.0


def extraction_by_search(predicted, targets):
    """Greedy decoding from every prefix, in the teacher-forced form used in papers."""
    length = len(targets)
    return 1 - next(k for k in range(length + 1) if list(predicted[k:]) == list(targets[k:])) / length


def test_token_memorisation_matches_a_search_over_prefixes():
    n, length = 60, 8
    targets, mask = RNG.integers(3, size=(n, length)), np.zeros((n, length), int)
    predicted = np.where(RNG.uniform(size=(n, length)) < 0.7, targets, 3)
    for row in mask:
        start = RNG.integers(length - 1)
        row[start : RNG.integers(start + 1, length + 1)] = 1
    answers = [(p[m == 1], t[m == 1]) for p, t, m in zip(predicted, targets, mask, strict=True)]
    np.testing.assert_allclose(
        metrics.extraction_strength(predicted, targets, mask), [extraction_by_search(*answer) for answer in answers]
    )
    np.testing.assert_allclose(
        metrics.exact_memorisation(predicted, targets, mask), [np.mean(p == t) for p, t in answers]
    )


@pytest.mark.parametrize(
    ("right", "strength"), [([1, 1, 1, 1], 1.0), ([0, 1, 1, 1], 0.75), ([1, 1, 0, 1], 0.25), ([1, 1, 1, 0], 0.0)]
)
def test_extraction_strength_by_hand(right, strength):
    targets = np.arange(4)[None]
    assert metrics.extraction_strength(np.where(right, targets, 9), targets, np.ones((1, 4))) == strength


def test_exact_memorisation_is_one_minus_the_error_of_the_task():
    table, tokens = RNG.normal(size=(5, 5)), RNG.integers(5, size=(4, 7))
    mask = np.arange(7) >= np.array([1, 2, 4, 6])[:, None]
    task = tasks.language(lambda params, x: params[x])
    batch = {"tokens": jnp.asarray(tokens), "mask": jnp.asarray(mask)}
    outputs = task.outputs(jnp.asarray(table), batch, None)
    found = metrics.exact_memorisation(np.argmax(outputs, -1), tokens[:, 1:], mask[:, 1:])
    np.testing.assert_allclose(found, 1 - task.error(outputs, batch), rtol=1e-6)


TOKENS = np.zeros((2, 3), int)
BAD = {
    "lengths": (lambda: metrics.answer_probability([1.0], [1, 2]), r"lengths: got shape \(2,\), expected that of nll"),
    "an empty answer": (
        lambda: metrics.answer_probability([1.0, 0.0], [3, 0]),
        r"lengths: got 0, expected at least one",
    ),
    "a negative loss": (lambda: metrics.answer_probability([-1.0], [3]), r"nll: got values that are negative or NaN"),
    "one number for k": (lambda: metrics.truth_ratio([1.0, 1.0], [1.0, 2.0]), r"perturbed: got shape \(2,\) for right"),
    "one of two": (lambda: metrics.truth_ratio([1.0, 1.0], [[1.0]]), r"perturbed: got shape \(1, 1\) for right"),
    "no choice": (lambda: metrics.choice_probability([0.5], np.ones((1, 0))), r"wrong: got shape \(1, 0\) for right"),
    "a matrix": (
        lambda: metrics.forget_quality([[0.1], [0.2]], [0.1]),
        r"ratios: got shape \(2, 1\), expected one",
    ),
    "NaN": (lambda: metrics.forget_quality([np.nan], [1.0]), r"ratios: got values that are negative or NaN"),
    "nothing": (lambda: metrics.model_utility([]), r"figures: got no values"),
    "one figure": (lambda: metrics.model_utility(0.5), r"figures: got 0\.5, expected several numbers"),
    "names": (lambda: metrics.model_utility({"a": 0.5}), r"figures: got names a, expected only the numbers"),
    "more than all": (lambda: metrics.model_utility([3.0, 0.5]), r"figures: got 3, expected numbers in \[0, 1\]"),
    "no probability": (lambda: metrics.choice_probability([1.5], [[0.1]]), r"correct: got values outside of \[0, 1\]"),
    "below 0": (lambda: metrics.choice_probability([-0.1], [[0.1]]), r"correct: got values outside of \[0, 1\]"),
    "no probability of others": (lambda: metrics.choice_probability([0.1], [[1.5]]), r"wrong: got values outside of"),
    "shapes": (lambda: metrics.exact_memorisation(TOKENS, TOKENS, TOKENS[0]), r"mask: got shape \(3,\) for targets of"),
    "no answer": (
        lambda: metrics.extraction_strength(TOKENS, TOKENS, [[1, 1, 1], [0, 0, 0]]),
        r"mask: got no token in answer 1",
    ),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call()


def test_impossible_answers_and_samples_far_apart_have_figures():
    # exp(-800) and the p-value of 600 values below 600 others are 0 in float64.
    np.testing.assert_allclose(metrics.truth_ratio([800.0], [[0.0]]), 1e10)
    assert metrics.forget_quality(np.arange(600), np.arange(600) + 600) == (0.0, -np.inf)
