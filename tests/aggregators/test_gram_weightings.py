"""`mean`, `dualproj` and `upgrad`: golden vectors, exact solutions, and the properties that each promises."""

import functools

import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
from hypothesis import given

from eupmu_jax.aggregators import dualproj, mean, upgrad
from eupmu_jax.aggregators.dualproj import conflict_free

pytestmark = pytest.mark.slow

seeds = st.integers(0, 10_000)
scales = st.sampled_from([1e-6, 1e-3, 1.0, 1e3, 1e6])


@functools.partial(jax.jit, static_argnums=0)
def combined(make, rows):
    tx = make(num_objectives=len(rows))
    return tx.update(rows, tx.init(rows[0]))[0]


def problem(seed, k, scale=1.0):
    """K badly scaled conflicting rows in ten dimensions."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(k, 10)) * 10 ** rng.uniform(-1, 1, size=(k, 1))
    rows[1] -= 1.5 * rows[0]
    return jnp.asarray(scale * rows)


@pytest.mark.parametrize(
    ("retain", "forget", "expected"),
    [
        ((1, 0), (-1, 1), (0.25, 0.75)),
        ((2, 1), (-1, 3), (0.5, 2)),
        ((1, 2), (-3, 1), (-1.05, 1.75)),
        ((1, 1), (1, 0), (1, 0.5)),
    ],
)
def test_golden_vectors_of_upgrad(retain, forget, expected):
    rows = jnp.array([forget, retain], jnp.float32)
    np.testing.assert_allclose(combined(upgrad, rows), expected, rtol=1e-6, atol=1e-7)
    # For two objectives, each projection is unilateral surgery of one row against the other.
    np.testing.assert_allclose(combined(upgrad, rows[::-1]), expected, rtol=1e-6, atol=1e-7)


def test_golden_vectors_of_dualproj_and_mean():
    rows = jnp.array([[-3.0, 1.0], [1.0, 0.0]])
    np.testing.assert_allclose(combined(mean, rows), [-1.0, 0.5])
    np.testing.assert_allclose(combined(dualproj, rows), [0.0, 0.5], atol=1e-7)


@pytest.mark.parametrize("k", [2, 3, 5])
@pytest.mark.parametrize("seed", range(5))
def test_the_projection_matches_an_independent_solver(k, seed):
    with jax.enable_x64(True):
        rows = problem(seed, k)
        start = np.asarray(rows).mean(axis=0)
        # By Moreau's decomposition, the projection is the point plus the nearest non-negative combination opposing it.
        multipliers, _ = scipy.optimize.nnls(np.asarray(rows).T, -start)
        expected = start + multipliers @ np.asarray(rows)
        np.testing.assert_allclose(combined(dualproj, rows), expected, rtol=1e-8, atol=1e-10)
        each = [scipy.optimize.nnls(np.asarray(rows).T, -row)[0] @ rows + row for row in np.asarray(rows)]
        np.testing.assert_allclose(combined(upgrad, rows), np.mean(each, axis=0), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("make", [dualproj, upgrad])
@pytest.mark.parametrize("k", [2, 3, 5])
@given(seed=seeds, scale=scales)
def test_the_direction_conflicts_with_no_objective(make, k, seed, scale):
    with jax.enable_x64(True):
        rows = problem(seed, k, scale)
        direction = combined(make, rows)
        products = rows @ direction / (jnp.linalg.norm(rows, axis=1) * jnp.linalg.norm(direction))
        assert products.min() > -1e-9


@pytest.mark.parametrize("make", [mean, dualproj, upgrad])
@given(seed=seeds, order=st.permutations(range(4)))
def test_the_order_of_the_rows_does_not_matter(make, seed, order):
    with jax.enable_x64(True):
        rows = problem(seed, 4)
        chex.assert_trees_all_close(combined(make, rows), combined(make, rows[jnp.array(order)]), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("make", [dualproj, upgrad])
def test_without_a_conflict_the_direction_is_the_mean(make):
    rows = jnp.array([[1.0, 0.5], [0.5, 1.0], [1.0, 1.0]])
    np.testing.assert_allclose(combined(make, rows), rows.mean(axis=0), rtol=1e-6)


@pytest.mark.parametrize("make", [dualproj, upgrad])
def test_opposite_gradients_leave_no_direction(make):
    rows = jnp.array([[2.0, -1.0], [-4.0, 2.0]])
    np.testing.assert_allclose(combined(make, rows), 0, atol=1e-6)


@pytest.mark.parametrize("make", [mean, dualproj, upgrad])
def test_zero_gradients_give_zero(make):
    np.testing.assert_array_equal(combined(make, jnp.zeros((3, 2))), 0)


def test_upgrad_is_linear_in_the_scale_of_each_row():
    # As long as no row vanishes, scaling a row scales its own projection and leaves the others unchanged.
    with jax.enable_x64(True):
        rows = problem(3, 3)
        scaled = rows.at[0].multiply(100.0)
        share = lambda rows: combined(upgrad, rows) * 3
        own = conflict_free(rows @ rows.T, jnp.array([1.0, 0.0, 0.0])) @ rows
        np.testing.assert_allclose(share(scaled) - share(rows), 99 * own, rtol=1e-7, atol=1e-9)


def test_the_state_reports_weights_and_gram_matrix():
    rows = jnp.array([[-1.0, 1.0], [1.0, 0.0]])
    tx = optax.chain(upgrad(), optax.sgd(0.1))
    _, state = tx.update(rows, tx.init(rows[0]), rows[0])
    np.testing.assert_allclose(optax.tree_utils.tree_get(state, "weights"), [0.75, 1.0])
    np.testing.assert_allclose(optax.tree_utils.tree_get(state, "gram"), rows @ rows.T)


def test_another_number_of_rows_is_refused():
    tx = upgrad(num_objectives=3)
    with pytest.raises(ValueError, match="updates: got 2 objectives, expected 3, as set by num_objectives"):
        tx.update(jnp.ones((2, 4)), tx.init(jnp.ones(4)))
