import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings

from eupmu_jax import implicit_surgery, unilateral_surgery
from eupmu_jax.tolerances import (
    as_tolerance,
    budget,
    check_levels,
    constant,
    evaluate,
    relative,
    resolve_num_objectives,
    schedule,
)

LEVELS = jnp.array([1.0, 2.0])


def evaluated(rule, count=4, levels=LEVELS):
    """The tolerance of the first step under a rule."""
    rule = as_tolerance(rule)
    step = jax.jit(lambda *args: evaluate(rule, *args, rule.init(2, jnp.float32), 2, jnp.float32))
    return step(count, levels)[0]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (0.5, [0.5, 0.5]),
        (np.array([0.1, 0.2]), [0.1, 0.2]),
        (lambda count: 0.25 * count, [1.0, 1.0]),
        (lambda count: jnp.array([0.0, 1.0]) * count, [0.0, 4.0]),
        (lambda count: 0.25 * count * jnp.ones(1), [1.0, 1.0]),
        (constant(2.0), [2.0, 2.0]),
        (schedule(lambda count: 0.25 * count), [1.0, 1.0]),
        (relative(0.1), [0.1, 0.2]),
        (relative(np.array([0.1, 1.0])), [0.1, 2.0]),
        (budget(1.5, rate=10.0), [5.0, -5.0]),
        (budget(-1.0, rate=10.0), [-20.0, -30.0]),
        (budget(np.array([1.0, 4.0]), rate=10.0), [0.0, 20.0]),
        (budget(1.5, rate=lambda count: 0.5 * count), [1.0, -1.0]),
        (budget(0.5, rate=10.0, relative_to_start=True), [5.0, 5.0]),
        (budget(1.5, learning_rate=0.1), [5.0, -5.0]),
        (budget(1.5, learning_rate=jnp.array(0.1)), [5.0, -5.0]),
        (budget(1.5, learning_rate=lambda count: 0.4 / count), [5.0, -5.0]),
        (budget(0.5, learning_rate=0.1, relative_to_start=True), [5.0, 5.0]),
        (budget(np.array([0.5, -1.0]), rate=10.0, relative_to_start=True), [5.0, -10.0]),
        # BUG: a list of limits raised TypeError.
        (budget([0.5, -1.0], rate=10.0, relative_to_start=True), [5.0, -10.0]),
    ],
)
def test_the_tolerance_of_a_step(rule, expected):
    epsilon = evaluated(rule)
    assert epsilon.dtype == jnp.float32
    np.testing.assert_allclose(epsilon, expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_losses_in_half_precision_do_not_round_limit_and_rate(dtype):
    # BUG: a rate above 65504 was infinite beside a float16 loss, so that no step was constrained, or all were refused;
    # a limit of 2.005 was 2 beside a bfloat16 one.
    rule = budget(2.005, learning_rate=1e-5)
    np.testing.assert_allclose(evaluated(rule, levels=LEVELS.astype(dtype)), [100_500.0, 500.0], rtol=1e-4)
    # BUG: so was the inverse of a float16 learning rate, as optax.inject_hyperparams passes it beside such parameters.
    rule = budget(2.005, learning_rate=jnp.asarray(2.0**-17, dtype))
    np.testing.assert_allclose(evaluated(rule), [131_727.36, 655.36], rtol=1e-4)


@pytest.mark.parametrize("value", [-1.0, float("nan"), np.array([0.1, -0.1]), np.zeros((2, 2))])
def test_negative_and_nan_are_refused(value):
    with pytest.raises(ValueError, match=r"^tolerance: got"):
        constant(value)
    # BUG: the message named `tolerance`, which `relative` does not have.
    with pytest.raises(ValueError, match=r"^share: got"):
        relative(value)


@pytest.mark.parametrize("limit", [float("nan"), np.array([0.1, np.nan]), np.zeros((2, 2))])
@pytest.mark.parametrize("relative_to_start", [False, True])
def test_a_budget_without_a_limit_is_refused(limit, relative_to_start):
    with pytest.raises(ValueError, match=r"^limit: got"):
        budget(limit, 1.0, relative_to_start=relative_to_start)


@pytest.mark.parametrize("rate", [-1.0, 0.0, float("nan"), np.array([1.0, 0.0])])
def test_a_budget_needs_a_positive_rate(rate):
    # BUG: a negative rate, which reverses the barrier, and a rate of 0, which makes the tolerance 0, were accepted.
    with pytest.raises(ValueError, match=r"^rate: got"):
        budget(1.0, rate)
    with pytest.raises(ValueError, match=r"^learning_rate: got .* or a schedule"):
        budget(1.0, learning_rate=rate)


def test_a_budget_needs_a_rate_or_a_learning_rate():
    with pytest.raises(ValueError, match=r"^rate, learning_rate: got neither"):
        budget(1.0)
    with pytest.raises(ValueError, match=r"^rate, learning_rate: got both"):
        budget(1.0, 1.0, learning_rate=0.1)


@pytest.mark.parametrize("learning_rate", [0.0, 1e-45, 1e-30, 1e-19])
def test_the_tolerance_stays_finite_under_a_schedule_that_ends_near_0(learning_rate):
    epsilon = evaluated(budget(1.5, learning_rate=lambda count: jnp.float32(learning_rate)), levels=1e4 * LEVELS)
    assert np.all(np.isfinite(epsilon))
    if learning_rate < 1e-20:
        np.testing.assert_array_equal(epsilon, 0)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [jnp.inf, np.array([0.5, np.inf])])
def test_a_run_without_a_limit_can_start_at_a_learning_rate_of_0(limit):
    # BUG: 0 times infinity made the tolerance NaN, so that the first step was refused again and again.
    tx = unilateral_surgery(budget(limit, learning_rate=optax.linear_schedule(0.0, 0.1, 5)), num_objectives=3)
    state = tx.init(jnp.zeros(2))
    for _ in range(3):
        _, state = tx.update(jnp.eye(3, 2), state, losses=jnp.array([1.0, 0.2, 0.3]))
    assert (state.count, state.nonfinite_count) == (3, 0)


def test_a_run_whose_learning_rate_falls_to_0_takes_all_its_steps():
    rates = optax.linear_schedule(0.1, 0.0, 10)
    tx = optax.chain(unilateral_surgery(budget(2.5, learning_rate=rates)), optax.sgd(rates))
    losses = lambda w: jnp.stack([jnp.sum((w - 3) ** 2), jnp.sum(w**2)])

    def step(carry, _):
        w, state = carry
        updates, state = tx.update(jax.jacobian(losses)(w), state, w, losses=losses(w))
        return (w + updates, state), losses(w)[1]

    w = jnp.ones(2)
    (w, state), levels = jax.jit(lambda carry: jax.lax.scan(step, carry, length=15))((w, tx.init(w)))
    assert (optax.tree_utils.tree_get(state, "nonfinite_count"), state[0].count) == (0, 15)
    assert 2.4 < levels[-1] < 2.6


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        (relative(0.1), "relative"),
        (budget(1.0, 1.0), "budget"),
        (budget(1.0, 1.0, relative_to_start=True), "budget"),
    ],
)
def test_rules_that_read_losses_report_missing_ones(rule, name):
    with pytest.raises(ValueError, match=f"^losses: got None, but the tolerance '{name}'"):
        rule.update(0, None, rule.init(1, jnp.float32))


@pytest.mark.parametrize("rule", [constant(np.ones(3)), schedule(lambda count: jnp.ones(3))])
def test_a_tolerance_needs_one_value_for_each_constraint(rule):
    with pytest.raises(ValueError, match=r"^tolerance: got shape \(3,\), expected a scalar or \(2,\)"):
        evaluated(rule)


def test_the_number_of_objectives_comes_from_any_setting_that_fixes_it():
    assert resolve_num_objectives(None) is None
    assert resolve_num_objectives(3) == 3
    assert resolve_num_objectives(None, None, 2) == 3
    assert resolve_num_objectives(3, 2) == 3
    assert budget(np.ones(2), 1.0, relative_to_start=True).num_constraints == 2
    with pytest.raises(ValueError, match="got 3 values, expected 2"):
        resolve_num_objectives(None, 2, 3)
    with pytest.raises(ValueError, match="K >= 2"):
        resolve_num_objectives(1)


def test_levels_are_the_retain_losses_unless_measured_otherwise():
    losses = jnp.array([9.0, 1.0, 2.0])
    np.testing.assert_array_equal(check_levels(None, losses, 2), losses[1:])
    np.testing.assert_array_equal(check_levels(jnp.array([0.1, 0.2]), losses, 2), jnp.array([0.1, 0.2]))
    assert check_levels(None, None, 2) is None


def test_a_budget_relative_to_start_measures_from_the_first_levels():
    rule = budget(np.array([0.5, 1.0]), lambda count: 2.0**count, relative_to_start=True)

    def step(state, step):
        epsilon, state = evaluate(rule, *step, state, 2, jnp.float32)
        return state, epsilon

    levels = jnp.array([[1.0, 2.0], [1.25, 2.0], [2.0, 0.0]])
    start, epsilon = jax.jit(lambda *steps: jax.lax.scan(step, rule.init(2, jnp.float32), steps))(jnp.arange(3), levels)
    np.testing.assert_array_equal(start, [1.0, 2.0])
    np.testing.assert_allclose(epsilon, [[0.5, 1.0], [0.5, 2.0], [-2.0, 12.0]])


# Opposite forget and retain gradients of unit length, so the multiplier is max(0, 1 - epsilon).
OPPOSITE = jnp.array([[-1.0, 0.0], [1.0, 0.0]])


def explicit():
    tx = unilateral_surgery(budget(0.5, 1.0, relative_to_start=True))
    return tx, lambda state, losses: tx.update(OPPOSITE, state, losses=losses)[1]


def implicit():
    # The controller discards the previous multiplier, so this one is max(0, 1 - epsilon) too.
    memoryless = optax.stateless(lambda delta, multiplier: jax.tree.map(lambda d, m: 1 - d - m, delta, multiplier))
    tx = implicit_surgery(budget(0.5, 1.0, relative_to_start=True), memoryless, proxy="level")
    return tx, lambda state, losses: tx.update(jnp.zeros(2), state, losses=losses)[1]


@pytest.mark.parametrize("surgery", [explicit, implicit])
def test_a_refused_first_step_does_not_fix_the_start(surgery):
    tx, update = surgery()
    losses = jnp.array([[1.0, jnp.nan], [jnp.inf, 9.0], [1.0, 2.0], [1.0, 2.25], [1.0, 3.0], [1.0, 1.0]])

    def step(state, losses):
        state = update(state, losses)
        return state, (state.multipliers[0], state.tolerance_state[0])

    state, (seen, start) = jax.jit(lambda state: jax.lax.scan(step, state, losses))(tx.init(jnp.zeros(2)))
    assert (state.count, state.nonfinite_count) == (4, 2)
    np.testing.assert_array_equal(start, [jnp.inf, jnp.inf, 2.0, 2.0, 2.0, 2.0])
    np.testing.assert_allclose(seen, [0.0, 0.0, 0.5, 0.75, 1.5, 0.0])


@pytest.mark.parametrize("relative_to_start", [False, True])
def test_levels_take_the_place_of_the_losses(relative_to_start):
    rule = budget(0.5, 1.0, relative_to_start=relative_to_start)
    for tx, updates in (
        (unilateral_surgery(rule), OPPOSITE),
        (implicit_surgery(rule, optax.sgd(1.0), proxy="level"), jnp.zeros(2)),
    ):
        measured = by_loss = tx.init(jnp.zeros(2))
        for level in (1.0, 2.0):
            _, by_loss = tx.update(updates, by_loss, losses=jnp.array([1.0, level]))
            _, measured = tx.update(updates, measured, losses=jnp.array([1.0, 7.0]), levels=jnp.array([level]))
        np.testing.assert_array_equal(measured.multipliers, by_loss.multipliers)
        np.testing.assert_array_equal(measured.tolerance_state, by_loss.tolerance_state)
        assert measured.multipliers[0] > 0


@pytest.mark.parametrize("shape", [(), (2,), (1, 1)])
def test_levels_of_another_shape_are_refused(shape):
    for tx, updates in (
        (unilateral_surgery(budget(0.5, 1.0)), OPPOSITE),
        (implicit_surgery(budget(0.5, 1.0), optax.sgd(1.0), proxy="level"), jnp.zeros(2)),
    ):
        with pytest.raises(ValueError, match=r"^levels: got"):
            tx.update(updates, tx.init(jnp.zeros(2)), losses=jnp.ones(2), levels=jnp.ones(shape))


# The barrier on strongly convex quadratics l_k(w) = 1/2 (w - c_k)' H_k (w - c_k) with diagonal H_k.


@jax.jit
def descend(start, centres, curvatures, limits, learning_rate, rate):
    """The retain losses and the squared lengths of the directions over 400 steps of surgery and SGD."""
    tx = unilateral_surgery(budget(limits, rate), num_objectives=len(centres))

    def losses(w):
        return 0.5 * jnp.sum(curvatures * (w - centres) ** 2, axis=1)

    def step(carry, _):
        w, state = carry
        direction, state = tx.update(jax.jacobian(losses)(w), state, w, losses=losses(w))
        return (w - learning_rate * direction, state), (losses(w)[1:], direction @ direction)

    return jax.lax.scan(step, (start, tx.init(start)), length=400)[1]


@pytest.mark.parametrize("k", [2, 3])
@settings(max_examples=15)
@given(st.integers(0, 10_000), st.sampled_from([0.1, 0.5, 1.0]), st.booleans())
def test_a_budget_bounds_the_retain_loss_to_second_order(k, seed, step_share, starts_above):
    rng = np.random.default_rng(seed)
    centres, curvatures = rng.normal(size=(k, 4)), rng.uniform(0.5, 2.0, size=(k, 4))
    centres[0] *= 10 / np.linalg.norm(centres[0])  # Unconstrained forgetting would cross the limits.
    # The origin keeps all limits with some margin, so they are always compatible.
    limits = 0.5 * np.sum(curvatures * centres**2, axis=1)[1:] * rng.uniform(1.05, 1.5, size=k - 1)
    start = centres[0] if starts_above else np.zeros(4)
    alpha = 0.02
    rate = step_share / alpha
    with jax.enable_x64():
        retain, squared = descend(*map(jnp.asarray, (start, centres, curvatures, limits, alpha, rate)))
    excess = np.asarray(retain) - limits
    second_order = 0.5 * alpha**2 * curvatures[1:].max(axis=1) * np.asarray(squared)[:, None]

    # The rounding error of the multipliers is relative to the demand.
    rounding = 1e-9 * (1 + np.abs(excess[:-1]))
    assert np.all(excess[1:] <= (1 - step_share) * excess[:-1] + second_order[:-1] + rounding)
    accumulated = second_order.max(axis=0) / step_share
    if starts_above:
        assert np.any(excess[0] > 0)
        assert np.all(excess[-1] <= (1 - step_share) ** 399 * np.maximum(excess[0], 0) + accumulated)
        assert np.all(excess[-1] <= 1e-2)
    else:
        assert np.all(excess <= accumulated)
    assert np.any(excess > -1e-2)  # The limits bind.


def test_halving_the_step_size_quarters_the_excess():
    with jax.enable_x64():
        w, centres, curvatures = jnp.zeros(2), jnp.array([[3.0, 1.0], [0.0, -1.0]]), jnp.array([[1.0, 1.0], [1.0, 2.0]])
        worst = [
            float(jnp.max(descend(w, centres, curvatures, jnp.array([1.0]), alpha, 1 / alpha)[0])) - 1.0
            for alpha in (0.02, 0.01, 0.005)
        ]
    assert worst[0] > 0
    np.testing.assert_allclose(np.divide(worst[1:], worst[:-1]), 0.25, rtol=0.1)
