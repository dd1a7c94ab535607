"""The aggregators that depend only on the Gram matrix: golden vectors, identities for two objectives, edge cases."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given

from eupmu_jax import unilateral_surgery
from eupmu_jax.aggregators import aligned_mtl, cagrad, config, imtl_g, mean, mgda, nash_mtl, ngdiff, pcgrad, upgrad
from eupmu_jax.aggregators._spectrum import apply_to_ones
from eupmu_jax.aggregators._weighting import from_gram

pytestmark = pytest.mark.slow

ROWS = (aligned_mtl, cagrad, config, imtl_g, mgda, nash_mtl, ngdiff, pcgrad)


@functools.partial(jax.jit, static_argnums=0)
def solved(make, rows):
    """The direction and the weights."""
    tx = make(num_objectives=len(rows))
    direction, state = tx.update(rows, tx.init(rows[0]))
    return direction, state.weights


def combined(make, rows):
    return solved(make, jnp.asarray(rows))[0]


PAIRS = [((1, 0), (-1, 1)), ((2, 1), (-1, 3)), ((1, 2), (-3, 1)), ((1, 1), (1, 0))]

# Directions for the above pairs of a retain and a forget gradient.
VECTORS = {
    pcgrad: [(0.5, 1.5), (1, 4), (-2.1, 3.5), (2, 1)],
    mgda: [(0.2, 0.4), (1.076923, 1.615385), (-0.411765, 1.647059), (1, 0)],
    ngdiff: [(0.292893, 0.707107), (0.578199, 1.395897), (-0.501470, 1.210655), (1.707107, 0.707107)],
    nash_mtl: [(0.541196, 1.306563), (0.541196, 1.306563), (-0.541196, 1.306563), (1.306563, 0.541196)],
    imtl_g: [(0.171573, 0.414214), (0.757359, 1.828427), (-0.656854, 1.585786), (1, 0.414214)],
    cagrad: [(0.2, 0.5), (1.237564, 2.368782), (-0.677510, 2.144981), (1.447214, 0.5)],
}


@pytest.mark.parametrize("pair", range(4))
@pytest.mark.parametrize("make", VECTORS)
def test_golden_vectors(make, pair):
    retain, forget = PAIRS[pair]
    for rows in ([forget, retain], [retain, forget]):
        direction = combined(make, np.array(rows, np.float32))
        np.testing.assert_allclose(direction, VECTORS[make][pair], rtol=3e-6, atol=1e-6)


def test_golden_weights_of_mgda():
    for (retain, forget), expected in zip(PAIRS, (0.6, 0.692308, 0.647059, 0), strict=True):
        _, weights = solved(mgda, jnp.array([forget, retain], jnp.float32))
        np.testing.assert_allclose(weights, [1 - expected, expected], atol=1e-6)


def test_the_released_cagrad_is_longer_by_a_factor():
    expected = [(0.344828, 0.862069), (2.133730, 4.084107), (-1.168120, 3.698242), (2.495196, 0.862069)]
    for (retain, forget), vector in zip(PAIRS, expected, strict=True):
        direction = 2 / (1 + 0.4**2) * combined(cagrad, np.array([forget, retain], np.float32))
        np.testing.assert_allclose(direction, vector, rtol=3e-6)


pairs = st.integers(0, 10_000).map(
    lambda seed: (
        np.random.default_rng(seed).normal(size=(2, 6)) * 10 ** np.random.default_rng(seed).uniform(-4, 4, (2, 1))
    )
)


@given(pairs)
def test_for_two_objectives_four_rules_share_the_bisector(rows):
    with jax.enable_x64(True):
        norms = np.linalg.norm(rows, axis=1)
        bisector = np.sum(rows / norms[:, None], axis=0)
        lengths = {
            ngdiff: 1,
            nash_mtl: np.sqrt(2) / np.linalg.norm(bisector),
            imtl_g: norms.prod() / norms.sum(),
            config: norms.mean(),
        }
        for make, length in lengths.items():
            np.testing.assert_allclose(combined(make, rows), length * bisector, rtol=1e-8, atol=1e-9 * length)


@given(pairs)
def test_for_two_objectives_pcgrad_is_twice_upgrad_and_its_forget_row_is_surgery(rows):
    with jax.enable_x64(True):
        both = combined(pcgrad, rows)
        np.testing.assert_allclose(both, 2 * combined(upgrad, rows), rtol=1e-9, atol=1e-12 * np.abs(rows).max())
        surgeries = bent(rows) + bent(rows[::-1])
        np.testing.assert_allclose(both, surgeries, rtol=1e-9, atol=1e-12 * np.abs(rows).max())


@jax.jit
def bent(rows):
    surgery = unilateral_surgery(0.0)
    return surgery.update(rows, surgery.init(rows[0]))[0]


@pytest.mark.parametrize("k", [2, 3, 15])
@pytest.mark.parametrize("make", ROWS)
def test_rules_work_for_any_number_of_objectives_at_any_scale(make, k):
    with jax.enable_x64(True):
        rng = np.random.default_rng(k)
        rows = rng.normal(size=(k, 40))
        rows[1] -= 1.5 * rows[0]
        direction, weights = solved(make, rows)
        assert np.isfinite(weights).all()
        if make in (config, imtl_g, mgda, nash_mtl) or (k == 2 and make in (ngdiff, pcgrad)):
            assert np.min(rows @ direction) > -1e-9
        # Directions scale with the gradients, except those of Nash-MTL and NGDiff.
        factor = 1 if make in (nash_mtl, ngdiff) else 1e6
        np.testing.assert_allclose(combined(make, 1e6 * rows), factor * direction, rtol=1e-7, atol=1e-9 * factor)


@pytest.mark.parametrize("make", [m for m in ROWS if m is not pcgrad])
@given(seed=st.integers(0, 1000), order=st.permutations(range(4)))
def test_the_order_of_the_rows_does_not_matter(make, seed, order):
    with jax.enable_x64(True):
        rows = np.random.default_rng(seed).normal(size=(4, 10))
        np.testing.assert_allclose(combined(make, rows[list(order)]), combined(make, rows), rtol=1e-5, atol=1e-7)


def test_pcgrad_draws_new_orders_in_every_step_and_the_seed_reproduces_them():
    rows = jnp.asarray(np.random.default_rng(2).normal(size=(5, 3)))

    def directions(seed):
        tx = pcgrad(seed, num_objectives=5)
        _, directions = jax.lax.scan(lambda s, _: tx.update(rows, s)[::-1], tx.init(rows[0]), length=6)
        return directions

    np.testing.assert_array_equal(directions(0), directions(0))
    assert len(np.unique(directions(0), axis=0)) > 3
    assert len(np.unique(directions(None), axis=0)) == 1
    # For two objectives there is no order to draw.
    two = lambda make, rows: np.asarray(combined(make, rows))
    np.testing.assert_array_equal(two(functools.partial(pcgrad, 3), rows[:2]), two(pcgrad, rows[:2]))


g, h = np.array([3.0, -4.0, 0.0]), np.array([0.0, 0.0, 2.0])
ZERO = np.zeros(3)

# Rows, and the directions that the docstrings promise for them.
EDGES = {
    "opposite": (
        [g, -2 * g],
        {imtl_g: ZERO, config: ZERO, mgda: ZERO, ngdiff: ZERO, nash_mtl: ZERO, pcgrad: ZERO, aligned_mtl: -g / 2},
    ),
    "opposite and equal": ([g, -g], {make: ZERO for make in ROWS}),
    "parallel": (
        [g, 2 * g],
        {
            imtl_g: 4 / 3 * g,
            config: 3 * g,
            mgda: g,
            ngdiff: 0.4 * g,
            nash_mtl: np.sqrt(2) / 5 * g,
            pcgrad: 3 * g,
            aligned_mtl: 1.5 * g,
            cagrad: 1.4 * 1.5 * g,
        },
    ),
    "equal": ([g, g], {imtl_g: g, config: 2 * g, mgda: g, pcgrad: 2 * g, aligned_mtl: g, cagrad: 1.4 * g}),
    "a zero row": (
        [ZERO, g],
        {imtl_g: ZERO, config: g, mgda: ZERO, ngdiff: g / 5, nash_mtl: g / 5, pcgrad: g, aligned_mtl: g / 2},
    ),
    "zero and two others": ([ZERO, g, h], {nash_mtl: g / 5 + h / 2, ngdiff: g / 5 + h / 2, pcgrad: g + h, mgda: ZERO}),
    "all zero": ([ZERO, ZERO], {make: ZERO for make in ROWS}),
    "all of three zero": ([ZERO, ZERO, ZERO], {make: ZERO for make in ROWS}),
    "opposite and another": ([g, -g, h], {mgda: ZERO, cagrad: h / 3, nash_mtl: h / 2}),
    "three equal": ([g, g, g], {mgda: g, cagrad: 1.4 * g, config: 3 * g, imtl_g: g, ngdiff: 0.6 * g, aligned_mtl: g}),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("rows", "directions"), EDGES.values(), ids=EDGES)
def test_zero_parallel_and_opposite_rows_give_the_documented_directions(rows, directions, dtype):
    with jax.enable_x64(dtype == np.float64):
        for make, expected in directions.items():
            # The length of a difference that cancels has an error of the square root of the rounding error.
            np.testing.assert_allclose(
                combined(make, np.array(rows, dtype)), expected, rtol=1e-5, atol=5e-4, err_msg=make.__name__
            )


def test_mgda_gives_equal_gradients_equal_weights():
    np.testing.assert_allclose(solved(mgda, jnp.stack([jnp.ones(3)] * 2))[1], [0.5, 0.5])


def test_cagrad_without_a_radius_is_the_mean():
    rows = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    without = functools.partial(cagrad, 0.0)
    np.testing.assert_allclose(combined(without, rows), combined(mean, rows), rtol=1e-6)


def test_imtl_g_and_config_have_equal_projections_on_all_unit_rows():
    with jax.enable_x64(True):
        rows = np.random.default_rng(1).normal(size=(4, 9)) * np.array([[1e-4], [1], [10], [1e4]])
        units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        for make in (imtl_g, config):
            products = units @ combined(make, rows)
            np.testing.assert_allclose(products, products[0], rtol=1e-8)
        np.testing.assert_allclose(solved(imtl_g, rows)[1].sum(), 1)


def test_aligned_mtl_is_the_mean_of_orthogonal_rows_of_equal_length():
    with jax.enable_x64(True):
        rows = np.random.default_rng(1).normal(size=(3, 9))
        left, lengths, right = np.linalg.svd(rows, full_matrices=False)
        for mode, length in (("min", lengths[-1]), ("median", lengths[1]), ("rmse", np.sqrt(np.mean(lengths**2)))):
            expected = length * (left @ right).mean(axis=0)
            make = functools.partial(aligned_mtl, mode)
            np.testing.assert_allclose(combined(make, rows), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cagrad(-0.1), r"^c: got -0\.1"),
        (lambda: aligned_mtl("mean"), r"^scale_mode: got 'mean', expected one of 'min', 'median', 'rmse'"),
    ],
)
def test_the_factory_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_weight_that_is_not_finite_is_not_applied():
    tx = optax.chain(pcgrad(), optax.sgd(1.0))
    rows = jnp.full((2, 3), 1e30)  # Its Gram matrix overflows.
    updates, state = tx.update(rows, tx.init(rows[0]), rows[0])
    np.testing.assert_array_equal(updates, 0)
    assert optax.tree_utils.tree_get(state, "nonfinite_count") == 1


def test_pcgrad_draws_an_order_for_each_row():
    # Each of three rows is projected off two others in either order, which makes eight directions. With one order for
    # all rows there would be six.
    rows = jnp.array([[1.0, -0.6, -0.3], [-0.5, 1.0, -0.7], [-0.2, -0.8, 1.0]])
    tx = pcgrad(0, num_objectives=3)
    _, found = jax.lax.scan(lambda state, _: tx.update(rows, state)[::-1], tx.init(rows[0]), length=100)
    assert len(np.unique(np.asarray(found).round(4), axis=0)) == 8


def test_imtl_g_has_no_direction_where_its_weights_sum_to_zero():
    cosines = np.array([[1.0, 0.8, 0.8], [0.8, 1.0, 0.4], [0.8, 0.4, 1.0]])
    best = np.linalg.solve(cosines, np.ones(3))
    assert best[0] < 0 < best[1]
    lengths = np.array([-best[0] / (best[1] + best[2]), 1.0, 1.0])
    rows = lengths[:, None] * np.linalg.cholesky(cosines)
    with jax.enable_x64(True):
        for scale in (1.0, 3.0, 7.0):
            np.testing.assert_array_equal(combined(imtl_g, scale * rows), 0)


def test_weights_that_are_not_finite_refuse_the_step():
    tx = from_gram(lambda gram: jnp.array([1.0, jnp.inf]))
    direction, state = tx.update(jnp.eye(2), tx.init(jnp.zeros(2)))
    np.testing.assert_array_equal(direction, 0)
    np.testing.assert_array_equal(state.weights, 0)
    assert (state.count, state.nonfinite_count) == (0, 1)


def test_cagrad_refuses_no_step_for_a_mean_that_is_zero_up_to_rounding():
    # The square of the mean is a sum of products that cancel, so rounding may make it negative.
    tx = cagrad(num_objectives=3)
    update = jax.jit(lambda rows: tx.update(rows, tx.init(rows[0])))
    for seed in range(20):
        two = np.random.default_rng(seed).normal(size=(2, 50)).astype(np.float32)
        direction, state = update(jnp.asarray([*two, -two.sum(axis=0)]))
        assert state.nonfinite_count == 0
        assert np.linalg.norm(direction) < 1e-2 * np.linalg.norm(two)


@pytest.mark.parametrize("k", [3, 5, 8])
def test_a_small_eigenvalue_does_not_amplify_rounding(k):
    # For nearly parallel rows the vector of ones is an eigenvector, and all other eigenvectors sum to 0.
    matrix = jnp.full((k, k), 1 - 1e-4).at[jnp.diag_indices(k)].set(1.0)
    found = apply_to_ones(matrix, lambda values, rank: 1 / values)
    np.testing.assert_allclose(found, 1 / (1 + (k - 1) * (1 - 1e-4)), rtol=2e-6)
