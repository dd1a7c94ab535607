"""Whole runs under the guard: what holds over time, what is measured, and what it reports for infeasible demands."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from eupmu_jax import multipliers, skip_nonfinite, tolerances, unilateral_surgery, utility_guard
from eupmu_jax.aggregators import owa

pytestmark = pytest.mark.slow

# The forget loss pulls to (2, 1), the retain loss to the origin, much harder along one axis than along the other.
TARGET = jnp.array([2.0, 1.0])
CURVATURE = jnp.array([1.0, 30.0])
START = jnp.array([0.05, 0.05])


def losses(w):
    return jnp.stack([0.5 * jnp.sum((w - TARGET) ** 2), 0.5 * jnp.sum(CURVATURE * w**2)])


def grads(w):
    return jax.jacobian(losses)(w)


def run(tx, steps=400, start=START, **extra_args):
    """Retain and forget losses after each step, and the last state."""

    def step(carry, _):
        w, state = carry
        updates, state = tx.update(grads(w), state, w, losses=losses(w), **extra_args)
        w = optax.apply_updates(w, updates)
        return (w, state), losses(w)

    (w, state), after = jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps))((start, tx.init(start)))
    return w, state, after[:, 1], after[:, 0]


OPTIMIZERS = {
    "momentum": optax.sgd(1e-3, momentum=0.9),
    "adamw": optax.adamw(1e-2, weight_decay=0.1),
    "schedule_free": optax.contrib.schedule_free_adamw(1e-2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_budget_is_kept_by_optimizers_that_bend_the_direction(name):
    limit = 0.3
    guard = utility_guard(OPTIMIZERS[name], tolerances.budget(limit, 0.3), unilateral_surgery(jnp.inf))
    _, _, retain, forget = run(guard)
    assert retain.max() <= 1.05 * limit
    assert forget[-1] < 0.7 * losses(START)[0]


def test_adam_after_surgery_violates_a_constraint_that_the_guard_keeps():
    rows = jnp.array([[-2.5, 2.5], [3.0, 1.0]])
    behind = optax.chain(unilateral_surgery(0.0), optax.adam(0.1))
    guard = utility_guard(optax.adam(0.1), 0.0)
    updates, _ = behind.update(rows, behind.init(START), START)
    assert jnp.vdot(rows[1], updates) > 0.1
    updates, _ = guard.update(rows, guard.init(START), START)
    assert jnp.vdot(rows[1], updates) <= 1e-6
    assert jnp.vdot(rows[0], updates) < 0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_halvings_keep_the_measured_loss_within_the_limit(name):
    limit = 0.3
    inner = optax.chain(OPTIMIZERS[name], optax.scale(30.0))
    guard = utility_guard(inner, tolerances.budget(limit, 0.9), unilateral_surgery(jnp.inf), max_halvings=12)
    _, state, retain, forget = run(guard, value_fn=lambda w: losses(w)[1:])
    assert retain.max() <= limit * (1 + 1e-6)
    assert forget[-1] < losses(START)[0]
    assert state.count == 400


def test_no_part_is_taken_of_a_step_along_which_the_loss_rises_everywhere():
    guard = utility_guard(optax.sgd(1.0), 0.0, unilateral_surgery(jnp.inf), max_halvings=3)
    w = jnp.ones(2)
    updates, state = guard.update(
        grads(w), guard.init(w), w, value_fn=lambda p: jnp.sum((p - w) ** 2)[None] + jnp.any(p != w)
    )
    chex.assert_trees_all_equal(updates, jnp.zeros(2))
    assert state.step_scale == 0


def test_infeasible_demands_are_reported_for_each_constraint():
    # The second and third retain gradients are opposite, and both losses are above their limits.
    rows = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [-1.0, 0.0]])
    guard = utility_guard(optax.sgd(0.1), tolerances.budget(jnp.array([1.0, 0.5, 0.5]), 1.0))
    start = jnp.zeros(2)
    _, state = guard.update(rows, guard.init(start), start, losses=jnp.array([1.0, 0.5, 1.0, 1.0]))
    assert state.guard_feasible[0]
    assert not np.all(state.guard_feasible[1:])


@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_a_step_that_is_not_finite_changes_nothing(where):
    guard = utility_guard(optax.adam(0.1), tolerances.budget(1.0, 0.5, relative_to_start=True))
    _, state = guard.update(grads(START), guard.init(START), START, losses=losses(START))
    bad_grads = grads(START).at[0, 0].set(jnp.nan) if where == "gradient" else grads(START)
    bad_losses = losses(START).at[1].set(jnp.inf) if where == "loss" else losses(START)
    updates, after = guard.update(bad_grads, state, START, losses=bad_losses)
    chex.assert_trees_all_equal(updates, jnp.zeros(2))
    chex.assert_trees_all_equal(after, state._replace(nonfinite_count=jnp.array(1, jnp.int32)))


def test_groups_can_be_aggregated_before_the_optimizer_and_guarded_one_by_one():
    rng = np.random.default_rng(0)
    rows = jnp.asarray(rng.normal(size=(4, 8)), jnp.float32)
    rows = rows.at[0].set(-5 * rows[1:].sum(0))
    start = jnp.zeros(8)
    guard = utility_guard(optax.adam(0.1), 0.0, owa(num_objectives=4), num_objectives=4)
    bare = optax.chain(owa(num_objectives=4), optax.adam(0.1))
    guarded, plain = (tx.update(rows, tx.init(start), start, losses=jnp.arange(4.0))[0] for tx in (guard, bare))
    assert np.all(np.asarray(rows[1:] @ guarded) <= 1e-5)
    assert np.any(np.asarray(rows[1:] @ plain) > 1e-2)
    # The guarded step still points along the optimizer's.
    assert guarded @ plain > 0


def test_a_guard_can_be_wrapped_and_its_multipliers_read():
    guard = skip_nonfinite(utility_guard(optax.adam(0.1), 0.0))
    updates, state = guard.update(jnp.array([[-1.0, 1.0], [1.0, 0.0]]), guard.init(START), START)
    assert multipliers(state).tolist() == [1.0]
    np.testing.assert_allclose(updates, [0.0, -0.1], atol=1e-6)


@pytest.mark.parametrize(
    ("kwargs", "call", "message"),
    [
        ({"max_halvings": -1}, {}, "max_halvings: got -1"),
        ({"max_halvings": 1}, {}, "value_fn: got None"),
        ({"tolerance": -0.1}, {}, "tolerance: got -0.1"),
        ({"num_objectives": 3}, {}, "updates: got 2 objectives, expected 3"),
        ({"tolerance": tolerances.budget(1.0, 0.5)}, {}, "losses: got None"),
        ({}, {"losses": jnp.ones(3)}, "losses: got"),
        ({}, {"losses": jnp.ones(2), "levels": jnp.ones(3)}, "levels: got"),
    ],
)
def test_bad_input_is_named(kwargs, call, message):
    def take_step():
        guard = utility_guard(optax.sgd(0.1), **({"tolerance": 0.0} | kwargs))
        guard.update(grads(START), guard.init(START), START, **call)

    with pytest.raises(ValueError, match=message):
        take_step()
