import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from eupmu_jax.metrics import Interval, paired_interval, tied

FIGURES = np.array([3.1, 2.9, 3.4, 3.0, 3.3, 2.2])


def expanded_tail(n, confidence=0.95):
    return stats.norm.cdf(stats.t.ppf((1 - confidence) / 2, n - 1) * np.sqrt(n / (n - 1)))


@pytest.mark.parametrize("n", [2, 3, 5, 6])
def test_the_interval_equals_that_of_all_resamples(n):
    differences = np.array([0.3, -1.2, 0.8, 2.0, 0.1, 0.6])[:n]
    means = np.mean(list(itertools.product(differences, repeat=n)), axis=1)
    tail = expanded_tail(n)
    found = paired_interval(differences, np.zeros(n))
    assert found.mean == pytest.approx(np.mean(differences))
    expected = np.quantile(means, [tail, 1 - tail], method="inverted_cdf")
    np.testing.assert_allclose((found.low, found.high), expected, atol=1e-12)
    # BUG: two methods were tied under some seeds of the resampling and not under others.
    assert paired_interval(differences, np.zeros(n), seed=1) == found


def test_many_pairs_are_resampled_at_random():
    differences = np.random.default_rng(0).normal(1.0, 2.0, 40)
    found, tail = paired_interval(differences, np.zeros(40)), expanded_tail(40)
    spread = np.std(differences) / np.sqrt(40)
    expected = stats.norm.ppf([tail, 1 - tail], np.mean(differences), spread)
    np.testing.assert_allclose((found.low, found.high), expected, atol=0.15 * spread)


def test_with_five_seeds_the_coverage_is_92_percent_where_a_plain_bootstrap_has_84():
    drawn = np.random.default_rng(0).normal(size=(400, 5))
    covered = np.mean([tied(differences, np.zeros(5)) for differences in drawn])
    plain = stats.bootstrap((drawn,), np.mean, axis=-1, method="percentile", n_resamples=1_000, rng=0)
    assert 0.89 < covered < 0.95
    low, high = plain.confidence_interval
    assert np.mean((low <= 0) & (high >= 0)) < covered - 0.04


@given(st.floats(-1e6, 1e6), st.integers(2, 12))
def test_equal_differences_give_a_width_of_zero(value, n):
    interval = paired_interval(np.full(n, value), np.zeros(n))
    assert interval.low == interval.high == interval.mean == pytest.approx(value)
    assert tied(np.full(n, value), np.full(n, value))
    assert tied(np.full(n, value), np.zeros(n)) == (value == 0)


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=8), st.sampled_from([1e-10, 1.0, 1e10]))
def test_at_every_scale_the_interval_contains_the_mean_and_stays_within_the_range(values, scale):
    differences = np.array(values) * scale
    interval = paired_interval(differences, np.zeros(len(values)))
    slack = 1e-12 * np.abs(differences).max()
    assert differences.min() - slack <= interval.low <= interval.mean <= interval.high <= differences.max() + slack


def test_the_pairing_matters_and_the_order_of_pairs_does_not():
    rng = np.random.default_rng(0)
    other, common = FIGURES - rng.normal(1.0, 0.3, 6), rng.normal(0, 100, 6)
    interval = paired_interval(FIGURES, other)
    np.testing.assert_allclose(paired_interval(FIGURES + common, other + common), interval, rtol=1e-9)
    mirrored = paired_interval(other, FIGURES)
    np.testing.assert_allclose((mirrored.mean, mirrored.high, mirrored.low), np.negative(interval), atol=0.05)
    # Without the pairing, noise shared by both would hide the difference.
    assert not tied(FIGURES + common, other + common)
    assert tied(FIGURES + common, np.roll(other + common, 1))


def test_the_seed_determines_the_resampling_and_confidence_the_width():
    zero = np.zeros(6)
    assert paired_interval(FIGURES, zero, seed=1) == paired_interval(FIGURES, zero, seed=1)
    narrow, wide = (paired_interval(FIGURES, zero, confidence=level) for level in (0.5, 0.95))
    assert wide.low < narrow.low < narrow.high < wide.high
    assert isinstance(wide, Interval)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([1.0], [2.0]), {}, r"^a, b: got shapes \(1,\) and \(1,\), expected .* n of at least 2"),
        (([1.0, 2.0], [2.0]), {}, r"^a, b: got shapes \(2,\) and \(1,\)"),
        (([1.0, np.nan], [2.0, 1.0]), {}, r"^a, b: got values that are not finite"),
        (([[1.0, 2.0]] * 2, [[2.0, 1.0]] * 2), {}, r"^a, b: got shapes \(2, 2\) and \(2, 2\)"),
        (([1.0, 2.0], [2.0, 1.0]), {"confidence": 1.0}, r"^confidence: got 1.0, expected a number between"),
        (([1.0, 2.0], [2.0, 1.0]), {"confidence": 95}, r"^confidence: got 95, expected a number between 0 and 1"),
    ],
)
def test_bad_arguments_are_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        paired_interval(*arguments, **options)


def test_different_seeds_draw_different_resamples_of_many_pairs():
    many = np.tile(FIGURES, 2)
    assert len({paired_interval(many, np.zeros(12), confidence=0.5, seed=seed) for seed in range(5)}) > 1


def test_a_narrow_interval_of_skewed_differences_contains_their_mean():
    found = paired_interval([0.0, 0.1, 0.2, 10.0], np.zeros(4), confidence=0.01)
    assert found.low <= found.mean <= found.high
