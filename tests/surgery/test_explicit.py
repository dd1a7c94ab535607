import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given

from eupmu_jax import tolerances, unilateral_surgery

# Retain and forget gradients, then the multiplier and direction for tolerances 0 and 0.5.
VECTORS = [
    ((1, 0), (-1, 1), 1.0, (0, 1), 0.5, (-0.5, 1)),
    ((2, 1), (-1, 3), 0.0, (-1, 3), 0.0, (-1, 3)),
    ((1, 2), (-3, 1), 0.2, (-2.8, 1.4), 0.1, (-2.9, 1.2)),
    ((1, 1), (1, 0), 0.0, (1, 0), 0.0, (1, 0)),
]


@jax.jit
def surgery(grads, tolerance=0.0, retain_weight=0.0):
    """Direction and multipliers; compiled once for each shape of the gradients."""
    num_objectives = len(jax.tree.leaves(grads)[0])
    tx = unilateral_surgery(tolerance, num_objectives=num_objectives, retain_weight=retain_weight)
    params = jax.tree.map(lambda leaf: leaf[0], grads)
    direction, state = tx.update(grads, tx.init(params), params)
    return direction, state.multipliers


@pytest.mark.parametrize(("retain", "forget", "multiplier", "direction", "tolerant_multiplier", "tolerant"), VECTORS)
def test_published_vectors(retain, forget, multiplier, direction, tolerant_multiplier, tolerant):
    grads = jnp.array([forget, retain], jnp.float32)
    for tolerance, expected in ((0.0, (direction, multiplier)), (0.5, (tolerant, tolerant_multiplier))):
        d, multipliers = surgery(grads, tolerance)
        np.testing.assert_allclose(d, expected[0], atol=1e-6)
        np.testing.assert_allclose(multipliers, [expected[1]], atol=1e-6)


def test_inner_products_run_over_all_leaves():
    grads = {"a": jnp.array([[-1.0], [1.0]]), "b": {"c": jnp.array([[[0.0, 2.0]], [[1.0, 0.0]]])}}
    tx = unilateral_surgery()
    params = jax.tree.map(lambda leaf: leaf[0], grads)
    d, state = tx.update(grads, tx.init(params), params)
    chex.assert_trees_all_close(d, {"a": jnp.array([-0.5]), "b": {"c": jnp.array([[0.5, 2.0]])}})
    np.testing.assert_allclose(state.gram, [[5.0, -1.0], [-1.0, 2.0]])
    np.testing.assert_allclose(state.multipliers, [0.5])
    assert (state.count, state.nonfinite_count) == (1, 0)


def test_direction_has_the_dtype_of_the_parameters():
    params = {"w": jnp.ones(2, jnp.bfloat16)}
    tx = unilateral_surgery()
    d, _ = tx.update({"w": jnp.ones((2, 2), jnp.float32)}, tx.init(params), params)
    chex.assert_trees_all_equal_shapes_and_dtypes(d, params)


def test_a_schedule_gets_the_number_of_steps_taken():
    tx = unilateral_surgery(lambda count: 0.25 * count)
    grads = jnp.array([[-1.0, 1.0], [1.0, 0.0]])
    state = tx.init(grads[0])
    first = []
    for _ in range(3):
        d, state = tx.update(grads, state)
        first.append(float(d[0]))
    np.testing.assert_allclose(first, [0.0, -0.25, -0.5])


def test_the_tolerance_can_be_injected_and_changed():
    tx = optax.inject_hyperparams(unilateral_surgery)(tolerance=0.0)
    grads = jnp.array([[-1.0, 1.0], [1.0, 0.0]])
    state = tx.init(grads[0])
    update = jax.jit(tx.update)
    np.testing.assert_allclose(update(grads, state)[0], [0.0, 1.0])
    state.hyperparams["tolerance"] = jnp.array(0.5)
    np.testing.assert_allclose(update(grads, state)[0], [-0.5, 1.0])


def test_an_injected_num_objectives_must_be_static():
    factory = optax.inject_hyperparams(unilateral_surgery, static_args="num_objectives")
    tx = factory(tolerance=0.0, num_objectives=3)
    chex.assert_shape(tx.init(jnp.ones(2)).inner_state.gram, (3, 3))
    # BUG: otherwise it became an array, which failed on a Python branch in the first jitted update.
    with pytest.raises(ValueError, match="static_args"):
        optax.inject_hyperparams(unilateral_surgery)(tolerance=0.0, num_objectives=3).init(jnp.ones(2))


def test_an_infinite_tolerance_lifts_the_constraint():
    # BUG: the factory accepted it, but then every step was refused as not finite.
    d, _ = surgery(jnp.array([[-1.0, 1.0], [1.0, 0.0]]), jnp.inf)
    np.testing.assert_allclose(d, [-1.0, 1.0])


def test_a_tolerance_that_reads_losses_needs_losses():
    tx = unilateral_surgery(tolerances.budget(1.0, 1.0))
    with pytest.raises(ValueError, match=r"losses: got None.*budget"):
        tx.update(jnp.ones((2, 3)), tx.init(jnp.ones(3)))


@pytest.mark.parametrize("weight", [0.0, 0.5, 3.0])
@pytest.mark.parametrize(("retain", "forget", "multiplier", "tolerant_multiplier"), [(*v[:3], v[4]) for v in VECTORS])
def test_a_retain_weight_is_the_least_multiplier(retain, forget, multiplier, tolerant_multiplier, weight):
    grads = jnp.array([forget, retain], jnp.float32)
    for tolerance, expected in ((0.0, multiplier), (0.5, tolerant_multiplier)):
        d, multipliers = surgery(grads, tolerance, weight)
        np.testing.assert_allclose(multipliers, [max(weight, expected)], atol=1e-6)
        np.testing.assert_allclose(d, grads[0] + max(weight, expected) * grads[1], atol=1e-6)


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf"), np.array([0.1, -0.1]), np.zeros((2, 2))])
def test_impossible_retain_weights_are_refused(weight):
    with pytest.raises(ValueError, match="retain_weight: got"):
        unilateral_surgery(retain_weight=weight)


def test_retain_weights_fix_the_number_of_objectives():
    tx = unilateral_surgery(retain_weight=np.array([1.0, 2.0]))
    chex.assert_shape(tx.init(jnp.ones(2)).gram, (3, 3))
    with pytest.raises(ValueError, match=r"retain_weight.*got 2 values, expected 1"):
        unilateral_surgery(num_objectives=2, retain_weight=np.ones(2))


@pytest.mark.parametrize("tolerance", [-0.1, float("nan"), np.array([0.1, -0.1]), np.zeros((2, 2))])
def test_impossible_tolerances_are_refused(tolerance):
    with pytest.raises(ValueError, match="tolerance"):
        unilateral_surgery(tolerance)


def test_the_number_of_objectives_is_checked():
    with pytest.raises(ValueError, match="num_objectives: got 1"):
        unilateral_surgery(num_objectives=1)
    with pytest.raises(ValueError, match="expected 2"):
        unilateral_surgery(np.zeros(3), num_objectives=3)
    tx = unilateral_surgery(np.zeros(3))
    with pytest.raises(ValueError, match="updates: got 3 objectives, expected 4"):
        tx.update(jnp.ones((3, 2)), tx.init(jnp.ones(2)))
    with pytest.raises(ValueError, match="at most 16"):
        unilateral_surgery(num_objectives=17)
    tx = unilateral_surgery()
    with pytest.raises(ValueError, match="at most 16"):
        tx.update(jnp.ones((17, 2)), tx.init(jnp.ones(2)))


def test_every_constraint_has_its_own_tolerance():
    grads = jnp.array([[-1.0, -1.0], [1.0, 0.0], [0.0, 1.0]])
    d, multipliers = surgery(grads, jnp.array([0.25, 2.0]))
    np.testing.assert_allclose(d, [-0.25, -1.0], rtol=1e-6)
    np.testing.assert_allclose(multipliers, [0.75, 0.0], rtol=1e-6)


def test_a_budget_keeps_the_retain_loss_below_its_limit():
    """Gradient flow on f = (x-3)^2 that must keep r = x^2 <= 1 ends at x = 1."""

    def losses(x):
        return jnp.stack([(x - 3) ** 2, x**2])

    tx = optax.chain(unilateral_surgery(tolerances.budget(limit=1.0, rate=5.0)), optax.sgd(0.01))

    def step(carry, _):
        x, state = carry
        updates, state = tx.update(jax.jacobian(losses)(x), state, x, losses=losses(x))
        x = optax.apply_updates(x, updates)
        return (x, state), losses(x)[1]

    x = jnp.array(0.0)
    (x, _), retain = jax.jit(lambda carry: jax.lax.scan(step, carry, length=500))((x, tx.init(x)))
    np.testing.assert_allclose(x, 1.0, rtol=1e-2)
    assert retain.max() <= 1.01


def test_a_constraint_that_is_met_is_feasible():
    grads = jnp.array([[-1.0, -1.0], [1.0, 0.0], [0.0, 1.0]])
    tx = unilateral_surgery(num_objectives=3)
    unknown = tx.init(grads[0])._replace(feasible=jnp.zeros(2, bool))
    np.testing.assert_array_equal(jax.jit(tx.update)(grads, unknown)[1].feasible, [True, True])


def test_a_zero_gradient_cannot_bring_a_loss_below_its_limit():
    tx = unilateral_surgery(tolerances.budget(1.0, 1.0), num_objectives=3)
    grads = jnp.array([[-1.0, -1.0], [1.0, 0.0], [0.0, 0.0]])
    update = jax.jit(lambda state, losses: tx.update(grads, state, losses=losses)[1])
    state = tx.init(grads[0])
    np.testing.assert_array_equal(state.feasible, [True, True])
    for levels, feasible in (([2.0, 0.5], [True, True]), ([2.0, 1.0], [True, True]), ([2.0, 1.5], [True, False])):
        state = update(state, jnp.array([1.0, *levels]))
        np.testing.assert_array_equal(state.feasible, feasible)
    # A refused step does not update the flags.
    np.testing.assert_array_equal(update(state, jnp.array([1.0, jnp.nan, 0.5])).feasible, [True, False])


def test_of_two_contradictory_demands_only_one_is_met():
    tx = unilateral_surgery(tolerances.budget(1.0, 1.0), num_objectives=3)
    grads = jnp.array([[0.0, 1.0], [1.0, 0.0], [-1.0, 0.0]])
    update = jax.jit(lambda state, losses: tx.update(grads, state, losses=losses))
    direction, state = update(tx.init(grads[0]), jnp.array([1.0, 2.0, 2.0]))
    assert state.feasible.sum() == 1
    np.testing.assert_array_equal(grads[1:] @ direction >= 1.0 - 1e-6, state.feasible)
    _, state = update(state, jnp.array([1.0, 2.0, 0.0]))
    np.testing.assert_array_equal(state.feasible, [True, True])


# Properties that hold at every scale of the forget and the retain gradients.

SIZE = 6
seeds = st.integers(0, 10_000)
exponents = st.integers(-10, 10)
tolerance_shares = st.sampled_from([0.0, 0.1, 1.0])


def rows(k, seed, forget_exponent=0, retain_exponent=0):
    """K rows that conflict more often than not."""
    rng = np.random.default_rng(seed)
    grads = rng.normal(size=(k, SIZE))
    grads[0] -= rng.uniform(0, 1, size=k - 1) @ grads[1:]
    grads *= 10.0 ** np.array([forget_exponent] + [retain_exponent] * (k - 1))[:, None]
    return jnp.asarray(grads, jnp.float32)


def norm(x):
    return np.linalg.norm(np.asarray(x, np.float64), axis=-1)


def dot(x, y):
    return np.asarray(x, np.float64) @ np.asarray(y, np.float64)


every_k = pytest.mark.parametrize("k", [2, 4])


@every_k
@given(seeds, exponents, exponents, tolerance_shares)
def test_no_retain_loss_rises_by_more_than_the_tolerance(k, seed, forget, retain, share):
    grads = rows(k, seed, forget, retain)
    tolerance = share * norm(grads[1:]).min() * norm(grads[0])
    d, _ = surgery(grads, tolerance)
    size = norm(grads[1:]) * norm(grads[0])
    assert np.all(dot(grads[1:], d) >= -tolerance - 1e-5 * size)


@every_k
@given(seeds, exponents, exponents, tolerance_shares)
def test_the_forget_loss_descends(k, seed, forget, retain, share):
    grads = rows(k, seed, forget, retain)
    d, _ = surgery(grads, share * norm(grads[1:]).min() * norm(grads[0]))
    assert dot(grads[0], d) >= dot(d, d) - 1e-5 * dot(grads[0], grads[0])


@every_k
@given(seeds, exponents, exponents)
def test_without_a_conflict_nothing_changes(k, seed, forget, retain):
    grads = rows(k, seed, forget, retain)
    signs = jnp.sign(grads[1:] @ grads[0])
    grads = grads.at[1:].multiply(signs[:, None])
    d, multipliers = surgery(grads)
    np.testing.assert_array_equal(d, grads[0])
    np.testing.assert_array_equal(multipliers, 0)


@every_k
@given(seeds, exponents, exponents)
def test_the_direction_scales_with_the_forget_gradient_and_not_with_the_retain_gradients(k, seed, forget, retain):
    d, _ = surgery(rows(k, seed))
    scaled, _ = surgery(rows(k, seed, forget, retain))
    np.testing.assert_allclose(scaled / 10.0**forget, d, atol=1e-5 * norm(rows(k, seed)[0]))


@given(seeds, st.permutations([1, 2, 3]))
def test_the_order_of_the_constraints_does_not_matter(seed, order):
    grads = rows(4, seed)
    tolerance = jnp.array([0.0, 0.1, 0.2])
    d, multipliers = surgery(grads, tolerance)
    order = np.array([0, *order])
    permuted, permuted_multipliers = surgery(grads[order], tolerance[order[1:] - 1])
    np.testing.assert_allclose(permuted, d, atol=1e-5 * norm(grads[0]))
    np.testing.assert_allclose(permuted_multipliers, multipliers[order[1:] - 1], rtol=1e-3, atol=1e-4)


@given(seeds, st.sampled_from([1e-3, 1.0, 1e3]))
def test_a_duplicate_constraint_changes_nothing(seed, scale):
    grads = rows(3, seed)
    d, _ = surgery(grads)
    again, _ = surgery(jnp.concatenate([grads, scale * grads[1:2]]))
    np.testing.assert_allclose(again, d, atol=1e-5 * norm(grads[0]))


@every_k
@given(seeds, exponents, tolerance_shares, st.sampled_from([0.1, 1.0, 10.0]))
def test_with_a_retain_weight_surgery_bends_the_weighted_sum(k, seed, exponent, share, largest):
    grads = rows(k, seed, exponent, exponent)
    weights = largest * np.random.default_rng(seed).uniform(size=k - 1).astype(np.float32)
    tolerance = share * norm(grads[1:]).min() * norm(grads[0])
    weighted = grads.at[0].add(weights @ grads[1:])
    expected, extra = surgery(weighted, tolerance)
    d, multipliers = surgery(grads, tolerance, weights)
    np.testing.assert_allclose(d, expected, atol=1e-5 * norm(grads[0]) + 1e-5 * weights @ norm(grads[1:]))
    np.testing.assert_allclose(multipliers, weights + extra, rtol=1e-3, atol=1e-3)
    assert np.all(multipliers >= weights)


@every_k
@given(seeds)
def test_surgery_is_idempotent(k, seed):
    grads = rows(k, seed)
    d, _ = surgery(grads)
    again, _ = surgery(grads.at[0].set(d))
    np.testing.assert_allclose(again, d, atol=1e-5 * norm(grads[0]))


def test_a_multiplier_that_overflows_refuses_the_step():
    transform = unilateral_surgery(tolerances.budget(0.1, rate=1e4))
    state = transform.init(jnp.zeros(2))
    rows = jnp.array([[1.0, 0.0], [0.0, 1e-18]])
    update, state = transform.update(rows, state, losses=jnp.array([1.0, 1e10]))
    np.testing.assert_array_equal(update, 0)
    assert int(state.nonfinite_count) == 1


@pytest.mark.parametrize("retain", [[[1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]], [[0.0, 0.0]]])
def test_a_nan_tolerance_refuses_the_step(retain):
    tx = unilateral_surgery(lambda count: jnp.nan, num_objectives=len(retain) + 1)
    grads = jnp.array([[-1.0, -1.0], *retain])
    d, state = tx.update(grads, tx.init(grads[0]))
    np.testing.assert_array_equal(d, 0)
    assert (state.count, state.nonfinite_count) == (0, 1)


def test_float64_parameters_from_numpy_give_no_warning():
    # BUG: JAX warned that float64 is not available, as it does not for its own functions of such arrays.
    chex.assert_type(unilateral_surgery().init({"w": np.ones(3)}).gram, jnp.float32)
