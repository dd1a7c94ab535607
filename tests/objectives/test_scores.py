"""The transport loss: where it rests, what it bounds, and which targets it gets."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from eupmu_jax.objectives import cross_entropy, log_odds, sequence_log_odds, transport, transport_targets

numbers = st.floats(-50, 50, width=32)
several = st.lists(numbers, min_size=1, max_size=20).map(lambda values: np.array(values, np.float32))


def test_log_odds_are_those_of_the_softmax():
    logits = jax.random.normal(jax.random.key(0), (6, 4))
    labels = jnp.array([0, 1, 2, 3, 0, 1])
    probabilities = jax.nn.softmax(logits)[jnp.arange(6), labels]
    chex.assert_trees_all_close(log_odds(logits, labels), jnp.log(probabilities / (1 - probabilities)), rtol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 30.0, 300.0])
def test_the_gradient_of_log_odds_does_not_vanish_where_that_of_the_loss_does(scale):
    logits = jnp.array([[scale, 0.0, 0.0]])
    of_score = jax.grad(lambda z: log_odds(z, jnp.array([0])).sum())(logits)
    assert of_score[0, 0] == 1.0
    np.testing.assert_allclose(of_score.sum(), 0.0, atol=1e-6)
    if scale > 100:
        assert jnp.abs(jax.grad(cross_entropy)(logits, jnp.array([0]))).max() == 0


def test_log_odds_of_half_precision_are_in_float32():
    assert log_odds(jnp.zeros((2, 3), jnp.bfloat16), jnp.zeros(2, int)).dtype == jnp.float32


def test_sequence_log_odds_are_finite_and_monotone_in_the_mean_loss():
    means = jnp.array([0.0, 1e-9, 1e-5, 1e-2, 1.0, 10.0, 1e3])
    scores = sequence_log_odds(jnp.repeat(means[:, None], 3, axis=1), jnp.ones((7, 3)))
    chex.assert_tree_all_finite(scores)
    assert (jnp.diff(scores) <= 0).all()
    p = np.exp(-1.0)
    np.testing.assert_allclose(scores[4], np.log(p / (1 - p)), rtol=1e-5)
    gradients = jax.vmap(jax.grad(lambda nll: sequence_log_odds(nll[None], jnp.ones((1, 3)))[0]))(jnp.zeros((2, 3)))
    chex.assert_tree_all_finite(gradients)


@given(several, several)
def test_targets_are_in_the_range_of_unseen_scores_and_never_above_their_own(scores, unseen):
    targets = transport_targets(scores, unseen)
    assert targets.shape == scores.shape
    assert (targets <= scores).all()
    assert (targets <= unseen.max()).all()
    assert (targets >= np.minimum(unseen.min(), scores)).all()


@given(several, several, st.integers(0, 2**31))
def test_targets_keep_the_order_of_scores_whatever_the_order_of_examples(scores, unseen, seed):
    order = np.random.default_rng(seed).permutation(len(scores))
    targets = transport_targets(scores, unseen)
    assert (np.diff(targets[np.argsort(scores, kind="stable")]) >= 0).all()
    if len(np.unique(scores)) == len(scores):
        np.testing.assert_array_equal(transport_targets(scores[order], unseen), targets[order])


@given(several)
def test_with_as_many_unseen_scores_the_targets_are_these_scores(unseen):
    targets = transport_targets(np.arange(len(unseen)) + 100.0, unseen)
    np.testing.assert_allclose(targets, np.sort(unseen), rtol=1e-6, atol=1e-6)


def test_weights_repeat_unseen_scores():
    unseen, scores = np.random.default_rng(0).normal(size=400), np.arange(50.0) + 100
    counts = np.random.default_rng(1).integers(0, 4, 400)
    repeated = transport_targets(scores, np.repeat(unseen, counts))
    np.testing.assert_allclose(transport_targets(scores, unseen, counts), repeated, atol=0.05)


@given(several, st.floats(-20, 20, width=32))
def test_the_loss_is_zero_with_a_zero_gradient_exactly_at_the_targets(targets, shift):
    value, gradient = jax.value_and_grad(transport)(jnp.array(targets), targets)
    assert value == 0
    assert not gradient.any()
    moved = transport(jnp.array(targets + np.float32(shift)), targets)
    assert moved >= 0
    if abs(shift) > 0.01:
        assert moved > 0


@given(several, st.integers(0, 2**31))
def test_the_loss_without_weights_is_at_least_the_optimal_transport_cost(targets, seed):
    scores = np.random.default_rng(seed).normal(size=len(targets)).astype(np.float32) * 5
    cost = lambda order: float(np.mean(optax.losses.huber_loss(scores - targets[order])))
    best = np.empty(len(targets), int)
    best[np.argsort(scores)] = np.argsort(targets)
    # Each side weighs at least a quarter, so four times the loss bounds the distance.
    assert 4 * float(transport(jnp.array(scores), targets)) >= cost(best) * (1 - 1e-5) - 1e-6


@pytest.mark.parametrize("scale", [1e-10, 1e-3, 1.0, 1e3, 1e10])
def test_far_from_its_target_every_score_has_a_gradient_of_one(scale):
    gradient = jax.grad(lambda s: transport(s, jnp.zeros(1)))(jnp.array([2.0 + scale]))
    assert gradient[0] == 1.0


def test_the_mean_over_parts_of_a_batch_is_the_loss_of_the_batch():
    scores, targets = jax.random.normal(jax.random.key(0), (2, 8)) * 3
    parts = [transport(scores[k::4], targets[k::4]) for k in range(4)]
    chex.assert_trees_all_close(jnp.mean(jnp.array(parts)), transport(scores, targets), rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.array([]), np.ones(3)), r"scores: got shape \(0,\), expected \(n,\), with at least one score"),
        ((np.ones(3), np.array([1.0, np.nan])), "unseen: got nan at position 1, expected finite scores"),
        ((np.array([np.inf]), np.ones(3)), "scores: got inf at position 0, expected finite scores"),
        ((np.ones(3), np.ones(3), np.zeros(3)), r"weights: got \(3,\) with a sum of 0, expected \(3,\), at least 0"),
        ((np.ones(3), np.ones(3), np.ones(2)), r"weights: got \(2,\) with a sum of 2, expected \(3,\)"),
    ],
)
def test_bad_scores_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        transport_targets(*arguments)


def test_on_a_problem_with_a_known_answer_it_rests_where_the_retrained_model_is():
    """Two Gaussians and a logistic model with one free shift for each forgotten example, as memorisation has it.

    The model w.x plus a memory of each training example fits the training set perfectly; a model that never saw the
    forget set has w.x alone, whose scores are Gaussian. Descent on the loss moves the memory.
    """
    key, dimension, count = jax.random.key(0), 20, 400
    mean = jnp.full(dimension, 0.4)
    x = lambda key, count: mean + jax.random.normal(key, (count, dimension))
    forget, unseen = x(jax.random.key(1), count), x(jax.random.key(2), 2000)
    weights, memory = mean, 6.0 + jnp.abs(jax.random.normal(key, (count,)))
    score = lambda memory: forget @ weights + memory
    targets = transport_targets(np.asarray(score(memory)), np.asarray(unseen @ weights))
    loss = lambda memory: count * transport(score(memory), targets)
    step = jax.jit(lambda m, _: (m - jax.grad(loss)(m), None))
    memory = jax.lax.scan(step, memory, length=300)[0]
    assert jnp.abs(jax.grad(loss)(memory)).max() < 1e-6
    # The retrained model's scores on the forget set itself, and those at rest, are two samples of one distribution.
    assert stats.ks_2samp(np.asarray(score(memory)), np.asarray(forget @ weights)).pvalue > 0.05
    assert stats.ks_2samp(np.asarray(score(memory)), np.asarray(unseen @ weights)).pvalue > 0.5
