import numpy as np
import pytest

from eupmu_jax.metrics import svc_confidence_attack


def confidences(seed, size, low):
    return np.random.default_rng(seed).uniform(low, 1.0, size)


def test_separated_confidences_give_0_for_members_and_100_for_strangers():
    members, strangers = confidences(0, 300, 0.95), confidences(1, 300, 0.0) * 0.8
    assert svc_confidence_attack(members, strangers, confidences(2, 50, 0.95)) == 0.0
    assert svc_confidence_attack(members, strangers, confidences(3, 50, 0.0) * 0.8) == 100.0


def test_a_forget_set_drawn_like_the_test_set_gets_the_attack_s_true_negative_rate():
    members, strangers = confidences(0, 2_000, 0.9), confidences(1, 2_000, 0.5)
    unseen, forget = confidences(2, 4_000, 0.5), confidences(3, 4_000, 0.5)
    true_negatives = svc_confidence_attack(members, strangers, unseen)
    assert 60 < true_negatives < 95
    assert svc_confidence_attack(members, strangers, forget) == pytest.approx(true_negatives, abs=3.0)


def test_the_larger_set_is_cut_to_the_smaller_in_random_order():
    # An index-ordered cut would take the confident half alone and call every doubtful member a stranger.
    members = np.concatenate([np.full(500, 0.999), np.full(500, 0.5)])
    strangers = np.full(500, 0.2)
    assert svc_confidence_attack(members, strangers, np.full(20, 0.5)) == 0.0
