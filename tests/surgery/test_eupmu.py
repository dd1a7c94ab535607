import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eupmu_jax as eupmu
from eupmu_jax import implicit_step, implicit_surgery, skip_nonfinite

PARAMS = jnp.array([0.5, -1.0])
BATCHES = jnp.ones((4, 2)), -jnp.ones((9, 2))


def loss(params, target):
    return jnp.mean((params - target) ** 2)


def train(tx, steps=5):
    step = implicit_step(loss, tx)

    def body(carry, _):
        params, state, _ = step(*carry, BATCHES)
        return (params, state), (params, eupmu.multipliers(state))

    return jax.jit(lambda carry: jax.lax.scan(body, carry, length=steps))((PARAMS, tx.init(PARAMS)))[1]


def test_steps_follow_the_equations_of_the_paper():
    """theta <- theta - alpha (g_f + lambda g_r), lambda <- max(0, lambda - beta ((l_r - l_r') / alpha + epsilon))."""
    alpha, epsilon, beta, theta, lam, expected = 0.1, 0.05, 0.5, PARAMS, 1.0, []
    for _ in range(5):
        forget, retain = (jax.grad(loss)(theta, b) for b in BATCHES)
        new = theta - alpha * (forget + lam * retain)
        lam = max(0.0, lam - beta * ((loss(theta, BATCHES[1]) - loss(new, BATCHES[1])) / alpha + epsilon))
        theta = new
        expected.append((theta, jnp.array([lam])))
    seen = train(eupmu.eupmu(alpha, epsilon, beta, initial_multiplier=1.0))
    chex.assert_trees_all_close(seen, jax.tree.map(lambda *x: jnp.stack(x), *expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("proxy", ["same_batch", "next_batch"])
def test_eupmu_is_the_chain_of_its_parts(proxy):
    schedule = optax.linear_schedule(0.2, 0.1, 5)
    surgery = implicit_surgery(0.1, optax.sgd(2.0), proxy=proxy, learning_rate=schedule)
    parts = optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(schedule, momentum=0.9), surgery)
    whole = eupmu.eupmu(schedule, 0.1, 2.0, momentum=0.9, max_norm=0.5, proxy=proxy)
    chex.assert_trees_all_close(train(whole), train(skip_nonfinite(parts)), rtol=1e-6)


def test_clipping_bounds_the_step():
    moved = np.diff(np.vstack([PARAMS, train(eupmu.eupmu(0.1, max_norm=0.01))[0]]), axis=0)
    np.testing.assert_allclose(np.linalg.norm(moved, axis=1), 0.1 * 0.01, rtol=1e-3)


def test_a_nonfinite_step_changes_nothing():
    tx = eupmu.eupmu(0.1, momentum=0.9)
    step = jax.jit(implicit_step(loss, tx))
    params, state, _ = step(PARAMS, tx.init(PARAMS), BATCHES)
    same, refused, _ = step(params, state, (BATCHES[0], BATCHES[1] * jnp.nan))
    chex.assert_trees_all_equal(same, params)
    assert optax.tree_utils.tree_get(refused, "nonfinite_count") == 1
    # The next finite step is as if there had been no refusal.
    chex.assert_trees_all_equal(step(same, refused, BATCHES)[0], step(params, state, BATCHES)[0])


def test_the_learning_rate_can_be_injected():
    # BUG: inject_hyperparams turned num_objectives into an array, on which the alias branched inside jit.
    train(optax.inject_hyperparams(eupmu.eupmu)(learning_rate=0.1), steps=1)


@pytest.mark.parametrize(
    "arguments",
    [
        *[{"learning_rate": bad} for bad in (-1, float("nan"), float("inf"), None, "0.1")],
        *[{"tolerance": bad} for bad in (-1.0, float("nan"), None)],
        *[{"multiplier_learning_rate": bad} for bad in (-1.0, float("nan"), float("inf"), None)],
        *[{"momentum": bad} for bad in (-0.1, 1.0, float("nan"), [0.1, 0.2])],
        *[{"max_norm": bad} for bad in (-1, 0.0, float("nan"))],
        *[{"initial_multiplier": bad} for bad in (-1.0, float("nan"))],
    ],
    ids=str,
)
def test_nonsensical_settings_are_refused_by_name(arguments):
    # BUG: a negative learning rate caused ascent, and a negative max_norm reversed the gradient.
    (name,) = arguments
    with pytest.raises(ValueError, match=f"^{name}: got"):
        eupmu.eupmu(**({"learning_rate": 0.1} | arguments))
