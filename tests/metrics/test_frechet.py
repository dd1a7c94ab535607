"""The Frechet distance against its closed form for Gaussians with the same principal axes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eupmu_jax.metrics.frechet import frechet_distance


def whitened(seed, n, d):
    """Points whose mean is 0 and whose covariance is the identity, exactly."""
    points = np.random.default_rng(seed).normal(size=(n, d))
    points -= points.mean(axis=0)
    return points @ np.linalg.inv(np.linalg.cholesky(np.atleast_2d(np.cov(points, rowvar=False)))).T


@given(st.integers(0, 50), st.integers(1, 5), st.floats(0.1, 5), st.floats(0.1, 5), st.floats(-3, 3))
def test_for_scaled_gaussians_it_is_the_closed_form(seed, d, one, other, shift):
    first, second = whitened(seed, 40, d) * one, whitened(seed + 100, 60, d) * other + shift
    expected = d * (shift**2 + (one - other) ** 2)
    np.testing.assert_allclose(frechet_distance(first, second), expected, rtol=1e-6, atol=1e-7)


@given(st.integers(0, 50))
def test_the_distance_is_symmetric_zero_for_equal_sets_and_invariant_to_rotations(seed):
    rng = np.random.default_rng(seed)
    first, second = rng.normal(size=(30, 4)) @ rng.normal(size=(4, 4)), rng.normal(size=(50, 4))
    turned = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    found = frechet_distance(first, second)
    np.testing.assert_allclose(frechet_distance(second, first), found, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(frechet_distance(first @ turned, second @ turned), found, rtol=1e-6, atol=1e-8)
    assert frechet_distance(first, first) < 1e-7 * np.trace(np.cov(first, rowvar=False))


def test_features_that_are_zero_everywhere_change_nothing():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(30, 3)), rng.normal(size=(30, 3))
    wider = lambda points: np.concatenate([points, np.zeros((30, 2))], axis=1)
    np.testing.assert_allclose(frechet_distance(wider(first), wider(second)), frechet_distance(first, second))


@pytest.mark.parametrize(
    ("features", "others", "message"),
    [
        (np.ones(3), np.ones((3, 1)), r"features: got shape \(3,\), expected \(n, d\)"),
        (np.ones((3, 2)), np.ones((1, 2)), r"others: got shape \(1, 2\)"),
        (np.ones((3, 2)), np.ones((3, 1)), "others: got 1 features, expected 2 as in features"),
        (np.full((3, 2), np.nan), np.ones((3, 2)), "features: got features that are not finite"),
    ],
)
def test_what_is_refused(features, others, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(features, others)


def test_lists_are_accepted():
    points = np.random.default_rng(0).normal(size=(9, 2))
    assert frechet_distance(points.tolist(), (points + 1).tolist()) == frechet_distance(points, points + 1)


def test_rounding_never_makes_the_distance_negative():
    sets = np.random.default_rng(0).normal(size=(50, 30, 4))
    assert min(frechet_distance(points, points) for points in sets) == 0.0


def test_fewer_points_than_features_have_a_distance():
    # The covariance is singular, and rounding makes some of its eigenvalues negative.
    points = np.random.default_rng(0).normal(size=(5, 12))
    assert frechet_distance(points, points + 1) == pytest.approx(12, rel=1e-6)


def test_features_in_float32_are_computed_with_in_float64():
    points = 1000 + np.random.default_rng(0).normal(size=(2, 9, 3)).astype(np.float32)
    assert frechet_distance(*points) == frechet_distance(*points.astype(np.float64))
