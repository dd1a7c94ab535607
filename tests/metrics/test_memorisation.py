import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier

from eupmu_jax import data
from eupmu_jax.metrics import memorisation_scores


@given(seed=st.integers(0, 2**32 - 1), models=st.integers(2, 12), examples=st.integers(1, 8))
def test_scores_are_the_difference_of_two_means(seed, models, examples):
    rng = np.random.default_rng(seed)
    probabilities, members = rng.uniform(size=(models, examples)), rng.random((models, examples)) < 0.5
    assume((members.any(axis=0) & ~members.all(axis=0)).all())
    columns = list(zip(probabilities.T, members.T, strict=True))
    scores = memorisation_scores(probabilities, members)
    np.testing.assert_allclose(scores, [p[m].mean() - p[~m].mean() for p, m in columns], atol=1e-12)
    np.testing.assert_allclose(memorisation_scores(probabilities, ~members), -scores, atol=1e-12)
    order = rng.permutation(models)
    np.testing.assert_allclose(memorisation_scores(probabilities[order], members[order]), scores, atol=1e-12)


def test_scores_of_memorised_unaffected_and_harmful_examples():
    members = np.array([[True] * 3, [False] * 3, [True] * 3, [False] * 3])
    probabilities = np.where(members, [1.0, 0.7, 0.25], [0.0, 0.7, 0.5])
    np.testing.assert_allclose(memorisation_scores(probabilities, members), [1, 0, -0.25], atol=1e-12)


def test_the_estimate_is_unbiased_and_its_error_is_the_documented_one():
    rng = np.random.default_rng(0)
    models, examples = 20, 40_000
    members = rng.permuted(np.repeat([[True], [False]], models // 2, axis=0).repeat(examples, axis=1), axis=0)
    probabilities = (rng.random((models, examples)) < np.where(members, 0.9, 0.5)).astype(float)
    errors = memorisation_scores(probabilities, members) - 0.4
    expected = np.sqrt(0.9 * 0.1 / 10 + 0.5 * 0.5 / 10)
    assert abs(errors.mean()) < 5 * expected / np.sqrt(examples)
    assert errors.std() == pytest.approx(expected, rel=0.02)
    assert expected < 1 / np.sqrt(models)


def test_mislabelled_digits_are_the_memorised_ones():
    # A nearest-neighbour classifier memorises its training examples, so wrong labels are predicted only for these.
    digits = data.load("digits")
    images, labels = digits.train_images[:600].reshape(600, -1), digits.train_labels[:600].copy()
    wrong = np.arange(0, 600, 20)
    labels[wrong] = (labels[wrong] + 1) % 10
    members = np.random.default_rng(0).random((24, 600)) < 0.5
    probabilities = np.stack(
        [KNeighborsClassifier(1).fit(images[m], labels[m]).predict(images) == labels for m in members]
    )
    scores = memorisation_scores(probabilities, members)
    assert scores[wrong].mean() > 0.9
    assert np.delete(scores, wrong).mean() < 0.2
    # The others are digits that look like a different one, which are memorised too.
    split = data.split(labels, "memorised:5%", num_classes=10, seed=0, scores=scores)
    assert np.isin(split.forget_ids, wrong).mean() > 0.7


@pytest.mark.parametrize(
    ("probabilities", "members", "message"),
    [
        (np.zeros((2, 3)), np.zeros((2, 4), bool), r"^members: got shape \(2, 4\) for probabilities of shape \(2, 3\)"),
        (np.zeros(3), np.zeros(3, bool), r"expected \(S, N\) for both$"),
        (np.zeros((2, 1)), np.array([[1], [0]]), "^members: got dtype int64, expected bool$"),
        (np.array([[-0.1], [0.5]]), np.array([[True], [False]]), "^probabilities: got values outside"),
        (np.array([[1.1], [0.5]]), np.array([[True], [False]]), "^probabilities: got values outside"),
        (np.array([[np.nan], [0.5]]), np.array([[True], [False]]), "^probabilities: got values outside"),
    ],
)
def test_bad_arguments_of_the_scores_are_named(probabilities, members, message):
    with pytest.raises(ValueError, match=message):
        memorisation_scores(probabilities, members)


def test_examples_in_all_or_no_training_sets_have_no_score():
    members = np.array([[True, True, False, True], [False, True, False, True]])
    with pytest.raises(ValueError, match=r"^members: got 3 examples that were in all or in none of 2 .* 1; expected"):
        memorisation_scores(np.full((2, 4), 0.5), members)
