import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from eupmu_jax import tolerances, unilateral_surgery
from eupmu_jax.training.budget import run_within_limit

START = jnp.array([1.0, -1.0])


def losses(w):
    return jnp.stack([jnp.sum((w - 2) ** 2), jnp.sum(w**2)])


def measure(w):
    return losses(w)[0], losses(w)[1:]


def block_of(tx):
    @jax.jit
    def block(w, state, anchor, index):
        for _ in range(10):
            updates, state = tx.update(jax.jacobian(losses)(w), state, w, losses=losses(w))
            w = optax.apply_updates(w, updates)
        return w, state

    return block


def run(limit, tx, start=START, **kwargs):
    return run_within_limit(block_of(tx), measure, limit, start, tx.init(start), blocks=6, steps_per_block=10, **kwargs)


def test_a_run_that_overshoots_is_moved_back_to_its_limit():
    result = run(3.0, optax.chain(unilateral_surgery(jnp.inf), optax.sgd(0.05)), bisections=10)
    assert result.history["levels"][-1][0] > 3.0  # no step was constrained
    assert 2.9 < result.best.levels[0] <= 3.0
    assert result.best.forget_loss < losses(START)[0]
    assert result.full_passes == len(result.history["step"]) + 12
    np.testing.assert_allclose(losses(result.best.params)[1:], result.best.levels, rtol=1e-6)


def test_a_run_that_ends_below_its_limit_is_extrapolated_to_it():
    tx = optax.chain(unilateral_surgery(tolerances.budget(3.0, 0.5)), optax.sgd(0.05))
    result = run(3.0, tx, bisections=10)
    assert result.history["step"] == [0, 10, 20, 30, 40, 50, 60]
    last = result.history["levels"][-1][0]
    assert last < 2.95
    assert 2.99 < result.best.levels[0] <= 3.0
    assert result.best.forget_loss < result.history["forget_loss"][-1]


def test_counters_and_keys_are_not_extrapolated():
    # BUG: a counter of 30 came back as 60, and a key raised an error after the last step.
    rest = {"count": jnp.int32(0), "key": jax.random.key(0)}

    def block(params, state, anchor, index):
        return params | {"w": params["w"] + 0.1, "count": params["count"] + 10}, state

    start = rest | {"w": jnp.array([0.1, 0.1])}
    result = run_within_limit(block, lambda p: measure(p["w"]), 9.0, start, (), blocks=3, steps_per_block=10)
    assert result.best.params["count"] == 30
    assert jax.random.key_data(result.best.params["key"]).tolist() == jax.random.key_data(rest["key"]).tolist()
    assert result.best.levels[0] > 0.5


def test_a_run_without_any_progress_returns_its_starting_point():
    tx = optax.chain(unilateral_surgery(jnp.inf), optax.sgd(0.0))
    result = run(2.5, tx, patience=2)
    assert result.best.infeasible
    assert result.history["step"] == [0, 10, 20]
    np.testing.assert_array_equal(result.best.params, START)


@pytest.mark.slow
def test_a_start_above_the_limit_is_repaired():
    # The barrier approaches its limit from above without reaching it, so aim a little below.
    tx = optax.chain(unilateral_surgery(tolerances.budget(0.99, 5.0)), optax.sgd(0.05))
    result = run(1.0, tx, patience=3)
    assert result.best.feasible
    assert result.best.levels[0] <= 1.0


def test_every_level_counts_at_the_end():
    # One level ends above the limit and one below, so the search must go back.
    block = lambda w, state, anchor, index: (w + 0.4, state)
    two = lambda w: (-w, jnp.stack([w, 0 * w]))
    result = run_within_limit(block, two, 1.0, jnp.array(0.0), (), blocks=3, steps_per_block=1)
    assert result.history["levels"][-1] == [pytest.approx(1.2), 0.0]
    assert 0.95 < result.best.levels[0] <= 1.0


def test_a_block_gets_the_last_measurement_and_the_last_parameters_are_kept():
    seen = []

    def block(w, state, anchor, index):
        seen.append((float(anchor[0]), float(anchor[1][0])))
        return w + 1, state

    result = run_within_limit(
        block, lambda w: (-w, w[None] * 2), 100.0, jnp.array(0.0), (), blocks=3, steps_per_block=1
    )
    assert seen == [(0.0, 0.0), (1.0, 2.0), (2.0, 4.0)]
    assert result.last == 3
