import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from sklearn.svm import SVC

from eupmu_jax import metrics
from eupmu_jax.metrics import svc_attack, svc_confidence_attack

UNLABELLED = ("entropy", "probabilities")


def confidences(seed, size, low):
    return np.random.default_rng(seed).uniform(low, 1.0, size)


def answers(seed, size, margin, accuracy=1.0):
    """Features of noisy logits with a margin at the label, or at another class for misclassified examples."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, size)
    logits, right = rng.normal(size=(size, 4)), rng.random(size) < accuracy
    logits[np.arange(size), np.where(right, labels, (labels + 1) % 4)] += margin
    return metrics.features(logits, labels)


def test_separated_confidences_give_0_for_members_and_100_for_non_members():
    members, strangers = confidences(0, 300, 0.95), confidences(1, 300, 0.0) * 0.8
    assert svc_confidence_attack(members, strangers, confidences(2, 50, 0.95)) == 0.0
    assert svc_confidence_attack(members, strangers, confidences(3, 50, 0.0) * 0.8) == 100.0


def test_a_forget_set_drawn_like_the_test_set_gets_the_true_negative_rate_of_the_attack():
    members, strangers = confidences(0, 600, 0.9), confidences(1, 600, 0.5)
    unseen, forget = confidences(2, 4_000, 0.5), confidences(3, 4_000, 0.5)
    true_negatives = svc_confidence_attack(members, strangers, unseen)
    assert 60 < true_negatives < 95
    assert svc_confidence_attack(members, strangers, forget) == pytest.approx(true_negatives, abs=3.0)


@pytest.mark.parametrize("feature", metrics.FEATURES)
def test_every_feature_gives_the_true_negative_rate_of_unseen_examples(feature):
    members, strangers = answers(0, 1_000, 6.0), answers(1, 1_000, 3.0, accuracy=0.8)
    unseen, forget = answers(2, 4_000, 3.0, accuracy=0.8), answers(3, 4_000, 3.0, accuracy=0.8)
    true_negatives = svc_attack(feature, members, strangers, unseen)
    assert 15 < true_negatives < 95
    assert svc_attack(feature, members, strangers, forget) == pytest.approx(true_negatives, abs=3.0)
    assert svc_attack(feature, members, strangers, answers(4, 1_000, 6.0)) < true_negatives - 10


def test_the_attack_by_confidence_is_that_of_the_papers():
    members, strangers, forget = answers(0, 400, 5.0), answers(1, 300, 2.0), answers(2, 200, 3.0)
    parts = (part["confidence"] for part in (members, strangers, forget))
    assert svc_attack("confidence", members, strangers, forget, seed=3) == svc_confidence_attack(*parts, seed=3)


def test_equal_targets_are_counted_individually():
    members, strangers = np.full(9, 0.99), np.full(9, 0.3)
    assert svc_confidence_attack(members, strangers, np.repeat([0.98, 0.31, 0.97], [3, 2, 3])) == 25.0


@pytest.mark.parametrize("size", [3, 40, 400])
@pytest.mark.parametrize("width", [1, 10])
# Not further out: at 1e8 scikit-learn rounds the differences away on some processors.
@pytest.mark.parametrize("start", [0.0, 1e3])
def test_the_attack_equals_that_of_scikit_learn(size, width, start):
    rng = np.random.default_rng(size)
    members, strangers = (start + rng.normal(shift, 1.0, (size, width)) for shift in (0.0, 0.5))
    targets = start + rng.normal(0.2, 1.0, (1_500, width))
    order = np.random.default_rng(7)
    shadows = np.concatenate([order.permutation(values) for values in (members, strangers)])
    attack = SVC(C=3, gamma="auto").fit(shadows, np.repeat([1, 0], size))
    expected = 100 * np.mean(attack.predict(targets) == 0)
    assert 0 < expected < 100
    sets = ({"probabilities": values} for values in (members, strangers, targets))
    assert svc_attack("probabilities", *sets, seed=7) == expected


def test_the_larger_set_is_subsampled_at_random_to_the_size_of_the_smaller():
    # Cutting in index order would keep only the confident half and classify every unsure member as a non-member.
    members = np.concatenate([np.full(500, 0.999), np.full(500, 0.5)])
    strangers = np.full(500, 0.2)
    assert svc_confidence_attack(members, strangers, np.full(20, 0.5)) == 0.0


def test_members_are_drawn_by_the_seed_up_to_the_cap():
    members, strangers, forget = confidences(0, 900, 0.6), confidences(1, 900, 0.4), confidences(2, 500, 0.4)
    few = [svc_confidence_attack(members, strangers, forget, seed, shadow_size=10) for seed in (0, 0, 1, 2, 3)]
    assert few[0] == few[1]
    assert len(set(few)) > 1
    assert svc_confidence_attack(members, strangers, forget, 0, 900) == svc_confidence_attack(
        members, strangers, forget
    )


@pytest.mark.parametrize("size", [1, 10, 101])
def test_with_equal_shadow_examples_the_attack_is_a_coin_toss(size):
    # libsvm assigns all to one side: members with 10 of each, non-members for some targets with 101 of each.
    right = metrics.features(9 * np.eye(3)[[0] * size], np.zeros(size, int))
    wrong = metrics.features(9 * np.eye(3)[[1] * 7], np.zeros(7, int))
    for feature in metrics.FEATURES:
        assert svc_attack(feature, right, right, wrong) == 50.0
        assert svc_attack(feature, right, right, right) == 50.0


@pytest.mark.parametrize("place", range(3))
def test_a_diverged_model_has_no_attack(place):
    sets = [answers(seed, 50, 3.0) for seed in range(3)]
    logits = np.full((50, 4), np.nan)
    sets[place] = metrics.features(logits, np.zeros(50, int))
    assert np.isnan(svc_attack("confidence", *sets))


def test_features_match_their_definitions():
    rng = np.random.default_rng(0)
    p, labels = rng.dirichlet(np.ones(5), 40), rng.integers(0, 5, 40)
    found = metrics.features(np.log(p) + rng.normal(size=(40, 1)), labels)
    for row, (q, y) in enumerate(zip(p, labels, strict=True)):
        modified = -(1 - q[y]) * np.log(q[y]) - sum(q[k] * np.log(1 - q[k]) for k in range(5) if k != y)
        np.testing.assert_allclose(found["modified_entropy"][row], modified, rtol=1e-10)
        np.testing.assert_allclose(found["entropy"][row], -np.sum(q * np.log(q)), rtol=1e-10)
        np.testing.assert_allclose(found["confidence"][row], q[y], rtol=1e-12)
        assert found["correctness"][row] == (np.argmax(q) == y)
    np.testing.assert_allclose(found["probabilities"], p, rtol=1e-12)


@given(
    npst.arrays(np.float32, (6, 3), elements=st.floats(-1e4, 1e4, width=32)),
    npst.arrays(np.int64, 6, elements=st.integers(0, 2)),
)
def test_features_are_finite_and_within_bounds_for_any_logits(logits, labels):
    found = metrics.features(logits, labels)
    assert tuple(found) == metrics.FEATURES
    assert all(np.isfinite(values).all() for values in found.values())
    assert (found["entropy"] <= np.log(3) + 1e-12).all()
    assert all((values >= 0).all() for values in found.values())
    other = metrics.features(logits, (labels + 1) % 3)
    for feature in UNLABELLED:
        np.testing.assert_array_equal(found[feature], other[feature])


def test_modified_entropy_depends_on_the_label_where_entropy_does_not():
    logits = np.array([[2000.0, 0.0, 0.0], [2000.0, 0.0, 0.0]])
    right, wrong = metrics.features(logits, np.array([0, 1]))["modified_entropy"]
    assert right == 0.0
    assert wrong == pytest.approx(2000.0 + 2000.0 - np.log(2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros(3), np.zeros(3, int)), r"^logits: got shape \(3,\), expected \(N, C\)"),
        ((np.zeros((3, 1)), np.zeros(3, int)), r"^logits: got shape \(3, 1\), expected \(N, C\) with at least two"),
        ((np.zeros((3, 2)), np.zeros(2, int)), r"^labels: got shape \(2,\), expected \(3,\)"),
        ((np.zeros((3, 2)), np.array([0, 1, 2])), r"^labels: got 0 to 2, expected 0 to 1"),
    ],
)
def test_bad_logits_and_labels_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        metrics.features(*arguments)


def test_bad_arguments_of_the_attack_are_named():
    known = answers(0, 10, 3.0)
    empty = {name: values[:0] for name, values in known.items()}
    with pytest.raises(ValueError, match=r"^feature: got 'loss', expected one of correctness, confidence, "):
        svc_attack("loss", known, known, known)
    with pytest.raises(ValueError, match=r"^targets: got no examples"):
        svc_attack("entropy", known, known, empty)
    with pytest.raises(ValueError, match=r"^shadow_size: got 0, "):
        svc_attack("entropy", known, known, known, shadow_size=0)
