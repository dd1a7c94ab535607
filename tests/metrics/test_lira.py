"""U-LiRA on Gaussian worlds, for which the best attack has a closed form."""

import numpy as np
import pytest
from scipy.special import logit
from scipy.stats import norm

from eupmu_jax.metrics import attack_figures, leave_pair_out, lira_statistic, u_lira


def worlds(seed, shadows, examples, shift=0.0, spread=1.0):
    """Phi of (unlearned, out) models: examples have different means, and the worlds differ by `shift` and `spread`."""
    rng = np.random.default_rng(seed)
    means = rng.normal(0, 3, examples)
    unlearned, out = (means + rng.normal(size=(size, examples)) for size in np.broadcast_to(shadows, 2))
    return means + spread * (unlearned - means) + shift, out


@pytest.mark.parametrize("pooled_variance", [False, True])
@pytest.mark.parametrize("shift", [0.0, 0.5, 1.0, 2.0])
def test_the_auc_of_shifted_gaussians_matches_its_closed_form(shift, pooled_variance):
    unlearned, out = worlds(0, 440, 60, shift)
    shadows, targets = slice(0, 400), slice(400, None)
    scores = u_lira(
        unlearned[shadows],
        out[shadows],
        np.stack([unlearned[targets], out[targets]]),
        pooled_variance=pooled_variance,
    )
    truth = np.broadcast_to(np.array([1, 0])[:, None, None], scores.shape)
    figures = attack_figures(scores, truth)
    assert figures["AUC"] == pytest.approx(norm.cdf(shift / np.sqrt(2)), abs=0.02)
    assert figures["accuracy"] == pytest.approx(norm.cdf(shift / 2), abs=0.02)
    assert figures["TPR at 1% FPR"] == pytest.approx(norm.sf(norm.isf(0.01) - shift), abs=0.04)


@pytest.mark.parametrize("pooled_variance", [False, True])
def test_leaving_pairs_out_detects_a_shift_and_a_spread_with_equal_means(pooled_variance):
    shifted = attack_figures(*leave_pair_out(*worlds(1, 64, 300, shift=1.0), pooled_variance=pooled_variance))
    assert shifted["AUC"] == pytest.approx(norm.cdf(1 / np.sqrt(2)), abs=0.02)
    spread = attack_figures(*leave_pair_out(*worlds(2, 64, 300, spread=2.0), pooled_variance=pooled_variance))
    assert spread["AUC"] == pytest.approx(2 / np.pi * np.arctan(2), abs=0.02)


@pytest.mark.parametrize("shadows", [4, 16, (12, 24)])
@pytest.mark.parametrize("pooled_variance", [False, True])
def test_without_a_signal_nothing_is_found(shadows, pooled_variance):
    scores, truth = leave_pair_out(*worlds(3, shadows, 2_000), pooled_variance=pooled_variance)
    assert scores.shape == truth.shape == (2, np.min(shadows), 2_000)
    figures = attack_figures(scores, truth)
    assert figures["AUC"] == pytest.approx(0.5, abs=0.015)
    assert figures["accuracy"] == pytest.approx(0.5, abs=0.015)
    assert figures["TPR at 1% FPR"] == pytest.approx(0.01, abs=0.01)


def test_with_few_shadow_models_a_pooled_variance_is_better():
    few = worlds(4, 5, 2_000, shift=1.0)
    single, pooled = (attack_figures(*leave_pair_out(*few, pooled_variance=choice))["AUC"] for choice in (False, True))
    assert single + 0.03 < pooled < norm.cdf(1 / np.sqrt(2))


def test_scores_are_log_likelihood_ratios_and_swapping_worlds_flips_them():
    rng = np.random.default_rng(5)
    unlearned, out, target = rng.normal(size=(6, 8)), rng.normal(1, 2, size=(5, 8)), rng.normal(size=(3, 8))
    scores = u_lira(unlearned, out, target)
    expected = norm.logpdf(target, unlearned.mean(0), unlearned.std(0, ddof=1)) - norm.logpdf(
        target, out.mean(0), out.std(0, ddof=1)
    )
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(u_lira(out, unlearned, target), -scores)
    np.testing.assert_allclose(u_lira(unlearned, out, target[1]), scores[1])


def test_saturated_shadow_models_give_finite_scores():
    saturated = np.full((8, 4), logit(1 - 1e-7))
    assert (u_lira(saturated, saturated, saturated[0]) == 0).all()
    scores, truth = leave_pair_out(saturated, -saturated)
    assert np.isfinite(scores).all()
    assert attack_figures(scores, truth)["AUC"] == 1.0
    assert attack_figures(np.zeros(8), np.repeat([0, 1], 4)) == {
        "AUC": 0.5,
        "accuracy": 0.5,
        "TPR at 1% FPR": 0.0,
        "TPR at 0.1% FPR": 0.0,
    }


def test_the_statistic_is_the_clipped_logit_of_the_confidence():
    rng = np.random.default_rng(6)
    p, labels = rng.dirichlet(np.ones(4), 50), rng.integers(0, 4, 50)
    np.testing.assert_allclose(lira_statistic(np.log(p), labels), logit(p[np.arange(50), labels]), rtol=1e-9)
    sure = np.array([[40.0, 0.0, 0.0], [3000.0, 0.0, 0.0]])
    np.testing.assert_allclose(lira_statistic(sure, np.array([0, 0])), logit(1 - 1e-7), rtol=1e-9)
    np.testing.assert_allclose(lira_statistic(sure, np.array([1, 2])), logit(1e-7), rtol=1e-9)


def test_figures_at_a_fixed_fpr_match_a_search_over_all_thresholds():
    rng = np.random.default_rng(7)
    truth = rng.integers(0, 2, 3_000)
    scores = np.round(rng.normal(truth, 1.0), 1)  # with ties
    rates = [[np.mean(scores[truth == kind] >= at) for kind in (0, 1)] for at in (*np.unique(scores), np.inf)]
    figures = attack_figures(scores, truth)
    for name, limit in (("TPR at 1% FPR", 0.01), ("TPR at 0.1% FPR", 0.001)):
        assert figures[name] == pytest.approx(max(true for false, true in rates if false <= limit))
    positive, negative = scores[truth == 1][:, None], scores[truth == 0]
    assert figures["AUC"] == pytest.approx(np.mean((positive > negative) + 0.5 * (positive == negative)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: u_lira(np.zeros((1, 3)), np.zeros((4, 3)), np.zeros(3)),
            r"^unlearned: got shape \(1, 3\), .* of 2 or",
        ),
        (lambda: u_lira(np.zeros((4, 3)), np.zeros((4, 2)), np.zeros(3)), r"^out: got 2 examples, expected 3 as in"),
        (lambda: u_lira(np.zeros((4, 3)), np.zeros((4, 3)), np.zeros(2)), r"^target: got shape \(2,\), "),
        (lambda: u_lira(np.zeros((4, 3)), np.zeros((4, 3)), 0.0), r"^target: got shape \(\), expected \(..., 3\)"),
        (lambda: u_lira(np.zeros((4, 3)), np.full((4, 3), np.inf), np.zeros(3)), r"^out: got phi that is not finite"),
        (lambda: u_lira(np.zeros((4, 3)), np.zeros((4, 3)), np.full(3, np.nan)), r"^target: got phi that is not"),
        (lambda: leave_pair_out(np.zeros((4, 3)), np.zeros((2, 3))), r"^out: got shape \(2, 3\), .* of 3 or more"),
        (lambda: attack_figures(np.zeros(3), np.zeros(2)), r"^truth: got shape \(2,\), expected that of scores"),
        (lambda: attack_figures(np.zeros(3), np.ones(3)), r"^truth: got the values \[1.0\], expected both 0 and 1"),
        (lambda: attack_figures(np.array([0, np.nan]), np.array([0, 1])), r"^scores: got NaN"),
        (lambda: attack_figures(np.array([0, np.inf]), np.array([0, 1])), r"^scores: got NaN or infinity"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_score_of_0_is_not_called_unlearned():
    assert attack_figures(np.array([0.0, 1.0, -1.0, -1.0]), np.array([1, 1, 0, 0]))["accuracy"] == 0.75


def test_a_pooled_variance_is_the_mean_of_the_variances_of_the_examples():
    rng = np.random.default_rng(0)
    unlearned, out = rng.normal(size=(6, 3)) * [1, 2, 9], rng.normal(size=(5, 3)) * [1, 1, 7]
    scales = (np.sqrt(world.var(axis=0, ddof=1).mean() + 1e-6) for world in (unlearned, out))
    one, other = (norm.logpdf(1.0, world.mean(axis=0), s) for world, s in zip((unlearned, out), scales, strict=True))
    np.testing.assert_allclose(u_lira(unlearned, out, np.ones(3), pooled_variance=True), one - other)
