"""Attacks of an audit: the AUC, its interval, false alarms, and shadow models."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eupmu_jax.service import _measured, attacks

NUMBERS = st.lists(st.integers(0, 9), min_size=2, max_size=30)


@given(NUMBERS, NUMBERS)
def test_the_auc_is_the_share_of_ordered_pairs_and_flips_with_the_sides(losses, unseen):
    pairs = [(a < b) + 0.5 * (a == b) for a in losses for b in unseen]
    found = attacks.attack(np.array(losses), np.array(unseen))
    assert found.auc == pytest.approx(np.mean(pairs))
    assert attacks.attack(np.array(unseen), np.array(losses)).auc == pytest.approx(1 - found.auc)
    assert 0 <= found.low <= found.auc <= found.high <= 1
    assert found.low < found.high


def test_the_interval_has_its_nominal_coverage():
    rng = np.random.default_rng(0)
    held = [not attacks.attack(rng.normal(size=80), rng.normal(size=120)).tells for _ in range(400)]
    assert 0.92 <= np.mean(held) <= 0.98


@pytest.mark.parametrize("few", [1, 3, 10, 30])
def test_small_forget_sets_raise_no_more_false_alarms_than_large_ones(few):
    rng = np.random.default_rng(0)
    told = [attacks.attack(rng.normal(size=few), rng.normal(size=500)).tells for _ in range(400)]
    assert np.mean(told) <= 0.075


def test_one_of_many_attacks_needs_stronger_evidence_to_raise_an_alarm():
    found = attacks.attack(np.arange(100.0), np.arange(100.0) + 10)
    assert found.tells
    assert not found.tells_among(20)


def test_true_positives_are_counted_at_the_threshold_and_their_interval_covers_the_truth():
    # BUG: they were read off the convex hull of the ROC curve, which gave 2 % for 1 %, a value no interval covered.
    pytest.importorskip("jax_privacy", reason="needs jax-privacy, of the extra `audit`")
    rng = np.random.default_rng(0)
    found = [attacks.canaries(rng.normal(size=200), rng.normal(size=1_600)) for _ in range(120)]
    assert np.mean([one.true_positives for one in found]) == pytest.approx(0.01, abs=0.003)
    assert np.mean([one.low <= 0.01 <= one.high for one in found]) > 0.8


def test_a_nan_loss_counts_as_that_of_a_model_that_knows_nothing():
    assert attacks.attack(np.full(3, np.nan), np.arange(4.0)).auc == 0.0
    assert attacks.attack(np.arange(4.0), np.full(3, np.nan)).auc == 1.0


def test_positions_of_shadow_models_must_lie_in_the_data():
    params = np.zeros(1)
    ((_, seen),) = attacks.checked_shadows([(params, [0, 2])], 3, params)
    assert seen.tolist() == [True, False, True]
    with pytest.raises(ValueError, match="shadows: got positions of number 0 outside of the data"):
        attacks.checked_shadows([(params, [0, 3])], 3, params)


@pytest.mark.parametrize(
    ("shadows", "message"),
    [
        (5, "shadows: got int, expected a list of pairs of parameters and the positions"),
        (np.zeros(3), "shadows: got float64 as number 0, expected a list of pairs"),
        ([({"a": np.zeros(1)}, [])], "shadows: got no positions as number 0, expected a list of pairs"),
        (iter([({}, [1])]), r"shadows, number 0: got no leaf \['a'\]"),
    ],
)
def test_invalid_shadow_models_are_named(shadows, message):
    # BUG: these ended in raw errors of Python and NumPy.
    with pytest.raises(ValueError, match=f"^{message}"):
        attacks.checked_shadows(shadows, 3, {"a": np.zeros(1)})


def test_scores_on_both_sides_of_the_unseen_ones_raise_no_more_false_alarms():
    # BUG: of samples from a mixture with an AUC of 0.5, one in five raised an alarm.
    rng = np.random.default_rng(0)
    drawn = [(3 * rng.choice([-1, 1], 30) + rng.normal(size=30), rng.normal(size=700)) for _ in range(300)]
    assert np.mean([attacks.attack(*pair).tells for pair in drawn]) < 0.09


def test_with_a_retrained_model_a_few_members_are_detected_and_unseen_examples_are_not():
    # The difficulty of examples varies more than learning changes their loss, so the loss of 30 alone tells little.
    rng = np.random.default_rng(0)
    loss = lambda phi: np.logaddexp(0, -phi)
    told = {"member": [], "unseen": [], "member by loss": []}
    for _ in range(200):
        hard = [3 * rng.normal(size=count) for count in (30, 400)]
        under = lambda gain=0.0, hard=hard: [
            loss(part + rng.normal(size=len(part)) + more) for part, more in zip(hard, (gain, 0.0), strict=True)
        ]
        retrained, member, unseen = under(), under(1.0), under()
        beside = lambda model, retrained=retrained: map(attacks.scores_beside, model, retrained)
        told["member"].append(attacks.attack(*beside(member)).tells)
        told["unseen"].append(attacks.attack(*beside(unseen)).tells)
        told["member by loss"].append(attacks.attack(*member).tells)
    assert np.mean(told["member"]) > 0.8
    assert np.mean(told["unseen"]) < 0.09
    assert np.mean(told["member by loss"]) < 0.5


def test_infinite_losses_do_not_disable_the_attacks_on_other_examples():
    # BUG: one infinite loss under one shadow model made all scores NaN, and the audit went without that attack.
    rng = np.random.default_rng(0)
    losses, shadow_losses = rng.uniform(1, 2, 9), rng.uniform(1, 2, (8, 9))
    unseen = np.zeros(shadow_losses.shape, bool)
    shadow_losses[0, 3] = shadow_losses[1:, 4] = np.inf
    scores = attacks.shadow_scores(losses, shadow_losses, unseen)
    assert np.flatnonzero(np.isnan(scores)).tolist() == [4]
    others = np.arange(9) > 4
    without = attacks.shadow_scores(losses[others], shadow_losses[:, others], unseen[:, others])
    assert np.argsort(scores[others]).tolist() == np.argsort(without).tolist()
    # BUG: their difference was NaN, which counts as never seen.
    assert attacks.scores_beside(np.array([np.inf, 1.0]), np.array([np.inf, np.inf])).tolist() == [0.0, -np.inf]


def test_shadow_models_score_both_sides_on_one_scale(monkeypatch):
    # BUG: each side had a variance of its own; where the model was better than all shadow models, their ratio told
    # unseen examples apart, in one case of three with four shadow models.
    phi, loss = np.random.default_rng(0).normal(5, 1, 40), lambda phi: np.logaddexp(0, -phi)
    shadows = object.__new__(_measured.Shadows)
    shadows.parts = [loss(phi), loss(phi)]
    shadows.losses = [loss(np.outer([-width, width], np.ones(40))) for width in (1.0, 1.5)]
    shadows.masks = np.zeros((2, 2, 40), bool)
    monkeypatch.setattr(_measured, "_losses", lambda task, params, part: part)
    assert shadows.figures(None, None)["lira"]["auc"] == pytest.approx(0.5, abs=0.01)


def test_losses_of_densities_which_may_be_negative_reveal_members_too():
    # BUG: all losses below 0 were read as the same one, so these attacks could not detect anything.
    rng = np.random.default_rng(0)
    retrained, shadow_losses = rng.normal(-3, 0.3, 60), rng.normal(-3, 0.3, (4, 60))
    losses, members = retrained + rng.normal(0, 0.1, 60), np.arange(60) < 30
    losses[members] -= 1
    beside = attacks.scores_beside(losses, retrained)
    assert attacks.attack(beside[members], beside[~members]).auc > 0.99
    scores = attacks.shadow_scores(losses, shadow_losses, np.zeros((4, 60), bool))
    assert attacks.attack(scores[members], scores[~members]).auc > 0.9
