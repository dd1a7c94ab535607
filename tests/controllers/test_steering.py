"""`forget_level` and `retain_limit`: where they settle, the effect of noise, and what surgery still guarantees."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eupmu_jax import accumulate, explicit_step, skip_nonfinite, unilateral_surgery
from eupmu_jax.aggregators import mean
from eupmu_jax.controllers import forget_level, retain_limit

STACK = {"w": jnp.array([[1.0, -1.0], [0.5, 2.0]])}
PARAMS = {"w": jnp.zeros(2)}


def steering(state):
    return next(node for node in state if hasattr(node, "weights") and hasattr(node, "integrals"))


def flow(tx, figure, steps=4_000, rate=0.01):
    """The flow on a forget loss -x and a retain loss x^2 / 2, which stops where the forget weight is x."""
    chain = optax.chain(tx, mean(), optax.sgd(2 * rate))

    def step(carry, _):
        x, state = carry
        grads = jnp.stack([-jnp.ones_like(x), x])
        updates, state = chain.update(grads, state, x, errors=figure(x))
        return (x + updates, state), x

    (x, state), path = jax.lax.scan(step, (jnp.float32(0), chain.init(jnp.float32(0))), length=steps)
    return float(x), steering(state), path


@pytest.mark.parametrize("gain", [1.0, 4.0, 20.0])
def test_proportional_control_settles_short_of_the_target_by_the_weight_over_the_gain(gain):
    x, state, _ = flow(forget_level(0.5, proportional=gain), lambda x: jnp.stack([x, 0 * x]))
    weight = float(state.weights[0])
    assert x == pytest.approx(gain * 0.5 / (gain + 1), abs=1e-6)
    assert x == pytest.approx(0.5 - weight / gain, abs=1e-6)


def test_with_an_integral_part_the_target_is_reached_exactly():
    x, state, _ = flow(forget_level(0.5, proportional=4.0, integral=0.05), lambda x: jnp.stack([x, 0 * x]))
    assert x == pytest.approx(0.5, abs=1e-6)
    assert float(state.weights[0]) == pytest.approx(0.5, abs=1e-5)


def test_a_target_out_of_reach_saturates_and_the_integral_does_not_wind_up():
    tx = forget_level(0.5, proportional=4.0, integral=0.5, max_weight=0.3)
    x, state, _ = flow(tx, lambda x: jnp.stack([x, 0 * x]))
    assert x == pytest.approx(0.3, abs=1e-5)
    chex.assert_trees_all_close((state.weights, state.integrals), (jnp.array([0.3]), jnp.array([0.0])))


@pytest.mark.slow
def test_at_a_target_of_1_the_weight_vanishes_once_the_error_reaches_it():
    # BUG: the integral accumulated on the way kept the weight at its maximum after the class was forgotten.
    tx = forget_level(1.0, proportional=50.0, integral=0.2, max_weight=2.0)
    state = tx.init(PARAMS)
    for error in [0.0] * 10 + [1.0] * 60:
        _, state = tx.update(STACK, state, PARAMS, errors=jnp.array([error, 0.0]))
    assert 0 <= float(state.weights[0]) < 0.2


def test_a_target_may_follow_a_ramp():
    ramp = optax.linear_schedule(0.0, 0.5, 2_000)
    tx = forget_level(ramp, proportional=50.0, max_weight=5.0)
    x, state, path = flow(tx, lambda x: jnp.stack([x, 0 * x]))
    assert float(state.targets[0]) == pytest.approx(0.5)
    assert float(path[1_000]) == pytest.approx(0.25, abs=0.02)
    assert x == pytest.approx(0.5 * 50 / 51, abs=1e-6)


@pytest.mark.parametrize("integral", [0.0, 0.2])
def test_the_retain_error_settles_where_the_theory_says(integral):
    # Rows -1 and w x balance at x = 1 / w with w = 1 + K (x - limit): x (1 + K (x - limit)) = 1.
    gain, limit = 2.0, 0.5
    x, state, _ = flow(
        retain_limit(limit, proportional=gain, integral=integral, max_weight=100.0), lambda x: jnp.stack([0 * x, x])
    )
    expected = limit if integral else (gain * limit - 1 + np.sqrt((gain * limit - 1) ** 2 + 4 * gain)) / (2 * gain)
    assert x == pytest.approx(expected, abs=1e-6)
    assert float(state.weights[0]) == pytest.approx(1 / expected, abs=1e-5)


def test_a_target_that_is_not_finite_refuses_the_step():
    # BUG: the integral kept its NaN, so that every later weight was NaN too.
    tx = forget_level(lambda count: jnp.where(count == 1, jnp.nan, 0.5), integral=0.2)
    state = tx.init(PARAMS)
    counts = []
    for _ in range(3):
        state = tx.update(STACK, state, PARAMS, errors=jnp.array([0.0, 0.0]))[1]
        counts.append(int(state.nonfinite_count))
    assert counts == [0, 1, 2]
    assert np.isfinite(state.weights).all()
    assert int(state.count) == 1


@pytest.mark.parametrize("make", [forget_level, retain_limit])
def test_gains_must_be_single_numbers_and_num_objectives_an_int(make):
    for name in ("proportional", "integral", "decay", "max_weight"):
        with pytest.raises(ValueError, match=rf"^{name}: got shape \(2,\), expected one number"):
            make(0.1, **{name: np.full(2, 1.5 if name == "max_weight" else 0.1)})
    for wrong, said in ((1, "K >= 2"), (-3, "K >= 2"), (2.0, "an int")):
        with pytest.raises(ValueError, match=rf"^num_objectives: got {wrong}, expected {said}"):
            make(0.1, num_objectives=wrong)


def test_limits_for_each_constraint_fix_their_number():
    tx = retain_limit(np.array([0.1, 0.2]))
    scaled, _ = tx.update({"w": jnp.ones((3, 2))}, tx.init(PARAMS), PARAMS, errors=jnp.array([0.9, 0.1, 0.2]))
    chex.assert_trees_all_equal(scaled, {"w": jnp.ones((3, 2))})
    with pytest.raises(ValueError, match=r"^max_weight: got 1.0, expected a finite number > 1"):
        retain_limit(0.1, max_weight=1.0)
    with pytest.raises(ValueError, match=r"^limit: got 2 values, expected 1"):
        retain_limit(np.array([0.1, 0.2]), num_objectives=2)


@pytest.mark.parametrize(("make", "k", "message"), [(forget_level, 2, "target"), (retain_limit, 4, "limit")])
def test_a_schedule_of_another_length_is_named(make, k, message):
    # BUG: JAX's error about shapes that cannot be broadcast.
    tx = make(lambda count: jnp.array([0.1, 0.2]), num_objectives=k)
    with pytest.raises(ValueError, match=rf"^{message}: got shape \(2,\), expected a number or"):
        tx.update({"w": jnp.ones((k, 2))}, tx.init(PARAMS), PARAMS, errors=jnp.zeros(k))


def test_within_the_limit_nothing_changes():
    tx = retain_limit(0.1)
    scaled, state = tx.update(STACK, tx.init(PARAMS), PARAMS, errors=jnp.array([0.9, 0.1]))
    chex.assert_trees_all_equal(scaled, STACK)
    assert state.weights.tolist() == [1.0]


def test_every_constraint_has_a_weight_of_its_own():
    tx = retain_limit(0.1, proportional=10.0, num_objectives=3)
    stack = {"w": jnp.ones((3, 2))}
    scaled, state = tx.update(stack, tx.init(PARAMS), PARAMS, errors=jnp.array([0.9, 0.1, 0.3]))
    np.testing.assert_allclose(state.weights, [1.0, 3.0], rtol=1e-6)
    np.testing.assert_allclose(scaled["w"][:, 0], [1.0, 1.0, 3.0], rtol=1e-6)


finite = st.floats(-10, 10, width=32)


@given(
    st.lists(st.lists(finite, min_size=3, max_size=3), min_size=2, max_size=2),
    st.floats(0, 1, width=32),
    st.floats(0, 100, width=32),
)
def test_whatever_the_level_the_surgery_keeps_its_constraint(rows, error, gain):
    rows = jnp.array(rows, jnp.float32)
    chain = optax.chain(forget_level(0.5, proportional=gain, max_weight=8.0), unilateral_surgery(0.01))
    params = jnp.zeros(3)
    direction, _ = chain.update(rows, chain.init(params), params, errors=jnp.array([error, 0.0]))
    forget, retain = np.asarray(rows, np.float64)
    scale = 8 * np.linalg.norm(forget) * np.linalg.norm(retain) + np.linalg.norm(retain) ** 2
    assert np.dot(direction, retain) >= -0.01 - 1e-5 * (1 + scale)


@pytest.mark.slow
@given(st.integers(0, 2**31 - 1))
def test_smoothing_has_no_bias(seed):
    figures = np.random.default_rng(seed).uniform(size=12).astype(np.float32)
    tx = forget_level(0.5, decay=0.8)
    state = tx.init(PARAMS)
    for count, figure in enumerate(figures):
        _, state = tx.update(STACK, state, PARAMS, errors=jnp.array([figure, 0.0]))
        weights = 0.8 ** np.arange(count + 1)[::-1]
        np.testing.assert_allclose(state.levels[0], np.average(figures[: count + 1], weights=weights), rtol=1e-4)


def test_batch_noise_is_as_large_as_the_docstring_says():
    rng = np.random.default_rng(0)
    figures = rng.binomial(64, 0.1, size=4_000).astype(np.float32) / 64
    tx = forget_level(0.1, decay=0.9)

    def step(state, figure):
        _, state = tx.update(STACK, state, PARAMS, errors=jnp.stack([figure, figure]))
        return state, state.levels[0]

    _, levels = jax.lax.scan(step, tx.init(PARAMS), jnp.asarray(figures))
    assert float(np.std(levels[100:])) == pytest.approx(np.sqrt(0.09 / 64 * 0.1 / 1.9), rel=0.1)


@pytest.mark.parametrize("make", [forget_level, retain_limit])
@pytest.mark.parametrize("fault", ["errors", "losses"])
def test_the_whole_chain_refuses_a_step_that_is_not_finite(make, fault):
    chain = skip_nonfinite(optax.chain(make(0.1), unilateral_surgery(retain_weight=1.0), optax.adam(0.1)))
    good = {"errors": jnp.array([0.0, 0.5]), "losses": jnp.array([1.0, 1.0])}
    _, state = chain.update(STACK, chain.init(PARAMS), PARAMS, **good)
    bad = good | {fault: jnp.array([jnp.nan, jnp.nan])}
    updates, refused = chain.update(STACK, state, PARAMS, **bad)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, PARAMS))
    assert [int(refused[k].nonfinite_count) for k in (0, 1)] == [1, 1]
    without = lambda state: [node._replace(nonfinite_count=0) for node in state[:2]] + list(state[2:])
    chex.assert_trees_all_equal(without(refused), without(state))


def test_microbatches_are_seen_one_by_one():
    tx = optax.chain(forget_level(0.5, proportional=1.0, decay=0.5), accumulate(unilateral_surgery(), 2))
    state = tx.init(PARAMS)
    for error in (0.0, 0.3):
        updates, state = tx.update(STACK, state, PARAMS, errors=jnp.array([error, 0.0]))
    # Weights 0.5, then 0.5 - 0.2 with 0.2 = (0.3 + 0.5 * 0) / 1.5, on gradients that do not conflict when averaged.
    mean_weight = (0.5 + 0.3) / 2
    surgery, scaled = unilateral_surgery(), {"w": STACK["w"] * jnp.array([[mean_weight], [1.0]])}
    expected, _ = surgery.update(scaled, surgery.init(PARAMS))
    chex.assert_trees_all_close(updates, expected, rtol=1e-5)


def test_a_step_passes_on_the_errors_of_its_losses():
    def loss(params, batch):
        residual = batch["x"] @ params - batch["y"]
        return jnp.mean(residual**2), jnp.mean(jnp.abs(residual) > 0.5)

    chain = optax.chain(forget_level(1.0, proportional=1.0), unilateral_surgery(retain_weight=1.0), optax.sgd(0.1))
    batches = [{"x": jnp.eye(2), "y": jnp.array(y)} for y in ([1.0, 0.0], [0.0, 1.0])]
    step = jax.jit(explicit_step(loss, chain, has_aux=True, errors=lambda aux: aux))
    params = jnp.zeros(2)
    _, state, (_, errors) = step(params, chain.init(params), tuple(batches))
    assert errors.tolist() == [0.5, 0.5]
    np.testing.assert_allclose(steering(state).levels, [0.5], rtol=1e-6)


@pytest.mark.parametrize("make", [forget_level, retain_limit])
@pytest.mark.parametrize(
    ("argument", "value"),
    [("proportional", -1.0), ("integral", np.nan), ("decay", 1.0), ("max_weight", 0.0), ("max_weight", np.inf)],
)
def test_bad_numbers_are_named(make, argument, value):
    with pytest.raises(ValueError, match=f"^{argument}: got {value}"):
        make(0.1, **{argument: value})


@pytest.mark.parametrize(("make", "argument"), [(forget_level, "target"), (retain_limit, "limit")])
@pytest.mark.parametrize("value", [-0.1, np.nan, np.inf, "low"])
def test_a_bad_level_is_named(make, argument, value):
    with pytest.raises(ValueError, match=f"^{argument}: got "):
        make(value)


@pytest.mark.parametrize(
    ("errors", "message"),
    [(None, "errors: got None, expected \\(2,\\)"), (jnp.ones(3), "errors: got shape \\(3,\\), expected \\(2,\\)")],
)
def test_errors_are_required_one_for_each_objective(errors, message):
    tx = forget_level(0.1)
    with pytest.raises(ValueError, match=message):
        tx.update(STACK, tx.init(PARAMS), PARAMS, errors=errors)


def test_a_function_of_the_aux_needs_an_aux():
    with pytest.raises(ValueError, match=r"^errors: got a function of the aux"):
        explicit_step(lambda params, batch: 0.0, unilateral_surgery(), errors=lambda aux: aux)


def test_a_saturated_integral_without_a_proportional_part_decreases_past_the_target():
    tx = forget_level(0.5, proportional=0.0, integral=1.0, decay=0.0)
    state, weights = tx.init(jnp.zeros(1)), []
    for error in (0.0, 0.0, 0.0, 1.0):
        _, state = tx.update(jnp.ones((2, 1)), state, errors=jnp.array([error, 0.0]))
        weights.append(float(state.weights[0]))
    np.testing.assert_allclose(weights, [0.5, 1.0, 1.0, 0.5])


def test_scaled_gradients_keep_their_dtypes():
    stack = {"w": jnp.ones((2, 2), jnp.bfloat16), "b": jnp.ones((2, 1))}
    tx = forget_level(0.5)
    scaled, _ = tx.update(stack, tx.init(PARAMS), errors=jnp.array([0.4, 0.0]))
    chex.assert_trees_all_equal_dtypes(scaled, stack)
