import itertools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from hypothesis import given

from eupmu_jax._stack.nnls import MAX_CONSTRAINTS, is_met, solve_multipliers

solve = jax.jit(solve_multipliers)
met = jax.jit(is_met)
SIZES = (2, 3, 5, 9)


def exact_multipliers(rows, tolerance):
    """The float64 solution found by trying every active set: feasible, optimal, and with the least dual objective."""
    rows, tolerance = np.asarray(rows, np.float64), np.asarray(tolerance, np.float64)
    norms = np.linalg.norm(rows, axis=1)
    norms[norms == 0] = 1
    unit, scale = rows / norms[:, None], norms[0]
    offset = unit[1:] @ unit[0] + tolerance / norms[1:] / scale
    cosines = unit[1:] @ unit[1:].T
    m, best, least = len(tolerance), None, np.inf
    for size in range(min(m, rows.shape[1]) + 1):
        for active in map(list, itertools.combinations(range(m), size)):
            multipliers = np.zeros(m)
            if size:
                block = cosines[np.ix_(active, active)]
                if np.linalg.eigvalsh(block)[0] < 1e-9:
                    continue  # Another subset is a basis of these rows.
                multipliers[active] = np.linalg.solve(block, -offset[active])
            slack = offset + cosines @ multipliers
            if multipliers.min(initial=0) < -1e-9 or (slack[norms[1:] > 0] < -1e-9 * (1 + multipliers.sum())).any():
                continue
            objective = 0.5 * multipliers @ cosines @ multipliers + offset @ multipliers
            if objective < least:
                best, least = multipliers, objective
    return best * scale / norms[1:]


def direction(rows, multipliers):
    return rows[0] + np.asarray(multipliers, np.float64) @ rows[1:]


def solved(rows, tolerance, dtype=jnp.float64):
    with jax.enable_x64(dtype == jnp.float64):
        gram = jnp.asarray(rows @ rows.T, dtype)
        return np.asarray(solve(gram, jnp.asarray(tolerance, dtype)), np.float64)


def assert_same_direction(rows, multipliers, exact, rtol):
    expected = direction(rows, exact)
    np.testing.assert_allclose(direction(rows, multipliers), expected, rtol=0, atol=rtol * np.linalg.norm(rows[0]))


def assert_optimal(rows, multipliers, tolerance, rtol):
    """Asserts the KKT conditions: primal and dual feasibility and complementarity; d is stationary by construction."""
    d = direction(rows, multipliers)
    size = np.linalg.norm(rows[1:], axis=1) * np.linalg.norm(rows[0]) + np.abs(tolerance)
    slack = rows[1:] @ d + tolerance
    assert np.all(multipliers >= 0)
    assert np.all(slack >= -rtol * size)
    lengths = multipliers * np.linalg.norm(rows[1:], axis=1) / np.linalg.norm(rows[0])
    np.testing.assert_array_less(lengths * slack, rtol * (1 + lengths.sum()) * size + 1e-300)


def conflicting_rows(k, seed):
    """K rows in K dimensions, of whose constraints about half bind."""
    rows = np.random.default_rng(seed).normal(size=(k, k))
    rows[0] -= 0.7 * rows[1:].sum(axis=0)
    return rows


DEGENERATE = {
    "independent": lambda rows: rows,
    "duplicated": lambda rows: np.concatenate([rows[:1], rows[[1 + i // 2 for i in range(len(rows) - 1)]]]),
    "opposite": lambda rows: np.concatenate([rows[:-1], -rows[-2:-1]]),
    "zero": lambda rows: np.concatenate([rows[:-1], np.zeros_like(rows[:1])]),
    "plane": lambda rows: rows * (np.arange(rows.shape[1]) < 2),
    "all equal": lambda rows: np.concatenate([rows[:1], np.repeat(rows[1:2], len(rows) - 1, axis=0)]),
    "scaled": lambda rows: rows * np.logspace(-8, 8, len(rows))[::-1, None],
    "scaled up": lambda rows: rows * np.logspace(-8, 8, len(rows))[:, None],
}


@pytest.mark.slow
@pytest.mark.parametrize("k", SIZES)
@pytest.mark.parametrize("change", DEGENERATE.values(), ids=DEGENERATE)
def test_direction_is_that_of_the_best_active_set(k, change):
    for seed in range(4 if k == 9 else 12):
        rows = change(conflicting_rows(k, seed))
        scale = np.linalg.norm(rows[1:], axis=1) * np.linalg.norm(rows[0])
        for share in (0.0, np.random.default_rng(seed).uniform(0, 0.5, size=k - 1)):
            tolerance = share * scale
            exact = exact_multipliers(rows, tolerance)
            for dtype, rtol in [(jnp.float64, 1e-6), (jnp.float32, 2e-4)]:
                multipliers = solved(rows, tolerance, dtype)
                assert_same_direction(rows, multipliers, exact, rtol)
                assert_optimal(rows, multipliers, tolerance, rtol)


@pytest.mark.parametrize("k", [9, MAX_CONSTRAINTS + 1])
def test_without_tolerance_agrees_with_scipy_nnls(k):
    for seed in range(10):
        rows = conflicting_rows(k, seed)
        expected, _ = scipy.optimize.nnls(rows[1:].T, -rows[0])
        np.testing.assert_allclose(solved(rows, np.zeros(k - 1)), expected, rtol=1e-6, atol=1e-9)


def test_with_tolerance_agrees_with_scipy_minimize():
    k = MAX_CONSTRAINTS + 1
    rows = conflicting_rows(k, seed=3) / k
    tolerance = np.random.default_rng(3).uniform(0, 0.2, size=k - 1)
    gram = rows @ rows.T

    def dual(x):
        return 0.5 * x @ gram[1:, 1:] @ x + (gram[0, 1:] + tolerance) @ x

    def gradient(x):
        return gram[1:, 1:] @ x + gram[0, 1:] + tolerance

    start, bounds = np.ones(k - 1), [(0, None)] * (k - 1)
    options = {"maxiter": 10_000, "ftol": 1e-15, "gtol": 1e-10}
    expected = scipy.optimize.minimize(dual, start, jac=gradient, bounds=bounds, method="L-BFGS-B", options=options).x
    multipliers = solved(rows, tolerance)
    assert np.count_nonzero(multipliers) > 3
    np.testing.assert_allclose(direction(rows, multipliers), direction(rows, expected), atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
@pytest.mark.parametrize(
    ("rows", "tolerance"),
    [
        ([[-1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], [0.0, 1e8]),
        ([[-1.0, 0.0], [1.0, 0.0], [0.0, 1e-8]], [0.0, 0.5]),
        ([[-1.0, 0.0], [1.0, 0.0], [0.0, 0.0]], [0.0, 1e8]),
    ],
    ids=["loose", "loose for a small row", "zero row"],
)
def test_a_loose_constraint_does_not_hide_a_violated_one(rows, tolerance, dtype):
    # BUG: the largest tolerance set the scale below which a violation counts as rounding, so d was g_0 here.
    np.testing.assert_allclose(solved(np.array(rows), tolerance, dtype), [1.0, 0.0], rtol=1e-6)


def test_the_tightest_of_duplicates_binds():
    rows = np.array([[-1.0, 2.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    multipliers = solved(rows, [0.5, 0.1, 0.9])
    np.testing.assert_allclose(direction(rows, multipliers), [-0.1, 2.0], rtol=1e-6)


@pytest.mark.parametrize("k", [2, 4])
def test_opposite_gradients_leave_no_direction(k):
    rows = np.array([[1.0, -2.0, 3.0]] + [[-2.0, 4.0, -6.0]] * (k - 1))
    np.testing.assert_allclose(direction(rows, solved(rows, np.zeros(k - 1))), 0, atol=1e-12)


def test_zero_rows_give_zero_multipliers():
    np.testing.assert_array_equal(solved(np.zeros((4, 3)), np.zeros(3)), 0)


@pytest.mark.parametrize("rows", [[[1.0, 0.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]]])
def test_zero_rows_give_zero_multipliers_whatever_they_demand(rows):
    np.testing.assert_array_equal(solved(np.array(rows), [-1.0, 0.0][: len(rows) - 1]), 0)


def test_a_small_demand_is_met_where_the_forget_gradient_is_zero():
    rows = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    np.testing.assert_allclose(solved(rows, [-1e-8, 0.0], jnp.float32), [1e-8, 0.0], rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_incompatible_demands_end_with_finite_multipliers(dtype):
    rows = np.array([[0.3, 1.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    multipliers = solved(rows, [-0.5, -0.5, 0.0], dtype)
    assert np.all(np.isfinite(multipliers))
    d = direction(rows, multipliers)
    assert max(d[0], -d[0]) >= 0.5 - 1e-6  # One of the two demands is met.


def test_a_demanded_decrease_is_met():
    rows = conflicting_rows(4, seed=0)
    tolerance = np.array([-1.0, -0.5, 0.0])
    multipliers = solved(rows, tolerance)
    assert_same_direction(rows, multipliers, exact_multipliers(rows, tolerance), 1e-6)
    assert np.all(rows[1:] @ direction(rows, multipliers) >= -tolerance - 1e-9)


@given(st.integers(0, 10_000), st.lists(st.integers(-10, 10), min_size=5, max_size=5), st.booleans())
def test_solution_is_optimal_whatever_the_scale_of_each_row(seed, exponents, tolerant):
    rng = np.random.default_rng(seed)
    rows = conflicting_rows(5, seed) * 10.0 ** np.array(exponents)[:, None]
    shares = rng.uniform(0, 1, size=4) * tolerant
    tolerance = shares * np.linalg.norm(rows[1:], axis=1) * np.linalg.norm(rows[0])
    assert_optimal(rows, solved(rows, tolerance), tolerance, 1e-9)
    assert_optimal(rows, solved(rows, tolerance, jnp.float32), tolerance, 1e-4)


@given(st.integers(0, 10_000), st.lists(st.integers(-3, 3), min_size=4, max_size=4), st.booleans())
def test_a_constraint_is_met_where_its_inequality_holds(seed, exponents, solved_for):
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(4, 3)) * 10.0 ** np.array(exponents)[:, None]
    tolerance = rng.normal(size=3) * np.linalg.norm(rows[1:], axis=1) * np.linalg.norm(rows[0])
    multipliers = solved(rows, tolerance, jnp.float32) if solved_for else rng.uniform(size=3)
    seen = np.asarray(met(*(jnp.asarray(value, jnp.float32) for value in (rows @ rows.T, tolerance, multipliers))))

    slack = rows[1:] @ direction(rows, multipliers) + tolerance
    size = np.abs(rows[1:] @ rows.T) @ np.concatenate([[1.0], multipliers]) + np.abs(tolerance)
    clear = np.abs(slack) > 2e-4 * size
    np.testing.assert_array_equal(seen[clear], (slack >= 0)[clear])
    assert np.all(seen[slack >= 0])


@given(st.integers(0, 10_000), st.sampled_from([jnp.float32, jnp.float64]))
def test_a_solution_without_demands_meets_every_constraint(seed, dtype):
    rows = conflicting_rows(5, seed)
    tolerance = np.random.default_rng(seed).uniform(0, 1, size=4)
    multipliers = solved(rows, tolerance, dtype)
    with jax.enable_x64(dtype == jnp.float64):
        seen = met(*(jnp.asarray(value, dtype) for value in (rows @ rows.T, tolerance, multipliers)))
        assert np.all(seen)
        # Without multipliers, g_0 violates the constraints that had one.
        undone = met(*(jnp.asarray(value, dtype) for value in (rows @ rows.T, tolerance, np.zeros(4))))
    np.testing.assert_array_equal(undone, rows[1:] @ rows[0] + tolerance >= 0)


@pytest.mark.parametrize("k", [2, 4])
def test_without_a_retain_gradient_a_limit_of_zero_is_met_and_a_demand_is_not(k):
    gram = jnp.zeros((k, k)).at[0, 0].set(1.0)
    assert np.all(met(gram, jnp.zeros(k - 1), jnp.zeros(k - 1)))
    assert not np.any(met(gram, jnp.full(k - 1, -1.0), jnp.zeros(k - 1)))
