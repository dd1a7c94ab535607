"""Min-k %, its AUC and PrivLeak, against plain loops and published figures."""

import numpy as np
import pytest

from eupmu_jax import metrics

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("share", [0.2, 0.4, 1.0])
def test_min_k_is_the_mean_of_the_least_likely_tokens(share):
    nll, lengths = RNG.exponential(size=(6, 11)), [11, 10, 5, 4, 1, 7]
    mask = np.array([[t < length for t in range(11)] for length in lengths])
    expected = [
        -np.mean(sorted(row[:n], reverse=True)[: max(1, int(n * share))]) for row, n in zip(nll, lengths, strict=True)
    ]
    np.testing.assert_allclose(metrics.min_k(nll, mask, share), expected)
    padded = np.where(mask, nll, np.nan)
    np.testing.assert_array_equal(metrics.min_k(padded, mask, share), metrics.min_k(nll, mask, share))


def test_a_share_that_binary_rounding_makes_smaller_costs_no_token():
    # BUG: 0.7 of 90 tokens were 62.
    assert metrics.min_k([np.arange(90.0)], np.ones((1, 90)), 0.7) == -np.mean(np.arange(27, 90))


def test_members_are_detected_by_their_least_likely_tokens():
    seen, unseen = RNG.exponential(1.0, size=(200, 64)), RNG.exponential(1.3, size=(200, 64))
    every = np.ones_like(seen)
    auc = metrics.separation(metrics.min_k(seen, every), metrics.min_k(unseen, every))
    assert auc > 0.9
    assert metrics.privleak(auc, 0.5) < -80


def test_separation_counts_ordered_pairs():
    forget, held_out = RNG.integers(5, size=20), RNG.integers(1, 6, size=30)
    pairs = [(a > b) + 0.5 * (a == b) for a in forget for b in held_out]
    assert metrics.separation(forget, held_out) == pytest.approx(np.mean(pairs))


def test_privleak_follows_the_sign_convention_of_muse():
    # It is computed from one minus the AUC: a published run with AUC 0.981 and a reference of 0.5 has -96.2.
    assert metrics.privleak(0.981, 0.5) == pytest.approx(-96.2)
    assert metrics.privleak(0.6, 0.6) == 0
    assert metrics.privleak(0.0, 0.5) == pytest.approx(100)


BAD = {
    "mask": (lambda: metrics.min_k([[1.0]], [1]), r"mask: got shape \(1,\) for nll of \(1, 1\)"),
    "share": (lambda: metrics.min_k([[1.0]], [[1]], 0.0), r"share: got 0\.0, expected a positive number <= 1"),
    "share of text": (lambda: metrics.min_k([[1.0]], [[1]], "all"), "share: got 'all', expected a positive number"),
    "no tokens": (lambda: metrics.min_k([[1.0]], [[0]]), r"mask: got no token in text 0"),
    "NaN": (lambda: metrics.min_k([[np.nan]], [[1]]), r"nll: got NaN"),
    "an empty set": (lambda: metrics.separation([1.0], []), r"held_out: got no scores, expected at least one"),
    "an infinite score": (lambda: metrics.separation([np.inf], [1.0]), r"forget: got scores that are not finite"),
    "no AUC": (lambda: metrics.privleak(1.2, 0.5), r"auc: got 1\.2, expected a number from 0 to 1"),
    "no reference": (lambda: metrics.privleak(0.5, 1.0), r"retrained_auc: got 1, expected less"),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call()


def test_privleak_is_relative_to_the_reference_of_one_minus_the_auc():
    assert metrics.privleak(0.9, 0.6) == pytest.approx(100 * (0.1 - 0.4) / 0.4)
