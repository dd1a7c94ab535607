"""`mgda`, `cagrad` and `nash_mtl` against SciPy's solutions of their problems, on badly scaled conflicting rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from eupmu_jax import aggregators
from eupmu_jax.aggregators import cagrad, mgda, nash_mtl

every_problem = pytest.mark.parametrize(
    ("k", "seed", "spread"), [(k, seed, spread) for k in (2, 3, 5) for seed in range(3) for spread in (0, 1, 4)]
)


@functools.partial(jax.jit, static_argnums=0)
def solved(make, rows):
    tx = make(num_objectives=len(rows))
    direction, state = tx.update(rows, tx.init(rows[0]))
    return direction, state.weights


@functools.cache
def cagrad_of(c):
    """Returns the same function for the same c, so that problems of one K share compiled code."""
    return functools.partial(cagrad, c)


def problem(k, seed, spread):
    """`(K, 8)` rows, the first two in conflict, with lengths from 10^-spread to 10^spread."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(k, 8))
    rows[1] -= 1.5 * rows[0]
    return rows * 10 ** rng.permutation(np.linspace(-spread, spread, k))[:, None]


@every_problem
def test_mgda_is_the_projection_of_zero_onto_the_convex_hull(k, seed, spread):
    rows = problem(k, seed, spread)
    with jax.enable_x64(True):
        direction, weights = map(np.asarray, solved(mgda, rows))
    assert weights.min() >= 0
    np.testing.assert_allclose(weights.sum(), 1)
    # This suffices for the shortest vector of a convex set: no point lies in front of the plane through the vector.
    slack = rows @ direction - direction @ direction
    assert slack.min() > -1e-9 * np.linalg.norm(direction) * np.linalg.norm(rows, axis=1).max()
    # A penalty that makes the weights sum to 1 turns it into a non-negative least squares problem for SciPy.
    if spread < 4:
        scale = 1e4 * np.abs(rows).max()
        lifted = np.vstack([rows.T, np.full(k, scale)])
        expected, _ = scipy.optimize.nnls(lifted, np.append(np.zeros(8), scale))
        np.testing.assert_allclose(direction, expected @ rows, atol=1e-6 * np.abs(rows).max())


@pytest.mark.slow
@every_problem
@pytest.mark.parametrize("c", [0.1, 0.9])
def test_cagrad_minimises_on_the_simplex_and_maximises_in_the_ball(k, seed, spread, c):
    rows = problem(k, seed, spread)
    rows /= np.abs(rows).max()
    with jax.enable_x64(True):
        direction, weights = map(np.asarray, solved(cagrad_of(c), rows))
    mean = rows.mean(axis=0)
    radius = c * np.linalg.norm(mean)
    np.testing.assert_allclose(weights @ rows, direction, atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(direction - mean), radius, rtol=1e-8)
    # By weak duality no primal value exceeds a dual value, so equal values are both optimal.
    on_simplex = np.maximum(weights - 1 / k, 0)
    on_simplex /= on_simplex.sum()
    combination = on_simplex @ rows
    dual = combination @ mean + radius * np.linalg.norm(combination)
    primal = np.min(rows @ direction)
    assert abs(dual - primal) < 1e-9 * np.linalg.norm(direction)


@every_problem
def test_nash_mtl_solves_the_bargaining_equations(k, seed, spread):
    rows = problem(k, seed, spread)
    with jax.enable_x64(True):
        direction, weights = map(np.asarray, solved(nash_mtl, rows))
    gram = rows @ rows.T
    np.testing.assert_allclose(gram @ weights * weights, 1, rtol=1e-7)
    np.testing.assert_allclose(np.linalg.norm(direction), np.sqrt(k), rtol=1e-7)
    if spread < 4:
        # Among all directions of this length, it has the largest product of descents.
        def value(logs):
            scaled = np.exp(logs)
            return scaled @ gram @ scaled / 2 - logs.sum()

        found = scipy.optimize.minimize(value, np.zeros(k), tol=1e-12)
        np.testing.assert_allclose(weights, np.exp(found.x), rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("k", [2, 3])
def test_float32_solutions_are_accurate_to_rounding(k):
    rows = problem(k, 1, 1)
    for make in (mgda, cagrad, nash_mtl):
        single = np.asarray(solved(make, rows.astype(np.float32))[0])
        with jax.enable_x64(True):
            double = np.asarray(solved(make, rows)[0])
        assert np.linalg.norm(single - double) < 1e-4 * np.linalg.norm(double)


@pytest.mark.parametrize("make", [aggregators.upgrad, aggregators.dualproj, aggregators.mgda])
def test_more_objectives_than_the_solvers_support_are_refused(make):
    with pytest.raises(ValueError, match=r"^num_objectives: got 16 objectives, expected at most 15"):
        make(num_objectives=16)
    transform = make()
    with pytest.raises(ValueError, match=r"^updates: got 16 objectives, expected at most 15"):
        transform.update(jnp.ones((16, 3)), transform.init(jnp.zeros(3)))
