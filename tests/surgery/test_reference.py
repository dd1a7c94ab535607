"""Parity with the released code, from an independent implementation of what it does (methods A.4)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from eupmu_jax import implicit_step, multipliers, reference_surgery

STEPS, RATE = 60, 0.01


def problem():
    """Forget and retain least squares, far enough from their minima that neither loss gets close to 0."""
    rng = np.random.default_rng(0)
    return [(rng.normal(size=(12, 3)), rng.normal(size=12)) for _ in range(2)]


def loss(w, batch):
    x, y = batch
    return jnp.mean((x @ w - y) ** 2)


def released_code(error, w_lr, gamma, initial, steps=STEPS):
    """Parameters and multipliers of every step in NumPy: SGD on the log losses, torch's Adam with L2 decay on w."""
    (xf, yf), (xr, yr) = problem()
    theta, w, m, v = np.ones(3), initial, 0.0, 0.0

    def value(x, y):
        return np.mean((x @ theta - y) ** 2)

    def slope(x, y):
        return 2 * x.T @ (x @ theta - y) / len(y) / (value(x, y) + 1e-8)

    seen = []
    for t in range(1, steps + 1):
        before = np.log(value(xr, yr) + 1e-8)
        theta = theta - RATE * (slope(xf, yf) + (w >= 0) * w * slope(xr, yr))
        delta = before - np.log(value(xr, yr) + 1e-8) - error
        g = delta + gamma * w
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        w = w - w_lr * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        seen.append((*theta, w))
    return np.array(seen)


@pytest.mark.parametrize(
    ("error", "w_lr", "gamma", "initial", "winds_up"),
    [
        (0.01, 1.0, 0.01, 0.0, True),
        (0.05, 0.3, 0.05, 1.0, False),
        (0.0, 0.5, 0.0, 2.0, True),
        (-0.5, 1.0, 0.01, 0.0, True),
    ],
)
def test_multipliers_and_parameters_are_those_of_the_released_code(error, w_lr, gamma, initial, winds_up):
    expected = released_code(error, w_lr, gamma, initial)
    assert (expected[:, -1].min() < 0) == winds_up

    with jax.enable_x64():
        surgery = reference_surgery(error, w_lr, gamma, initial)
        tx = optax.chain(optax.sgd(RATE), surgery)
        step = implicit_step(loss, tx, loss_scale="log")
        batches = tuple((jnp.asarray(x), jnp.asarray(y)) for x, y in problem())

        def body(carry, _):
            params, state, _ = step(*carry, batches)
            return (params, state), jnp.append(params, multipliers(state))

        start = jnp.ones(3, jnp.float64)
        _, seen = jax.jit(lambda carry: jax.lax.scan(body, carry, length=STEPS))((start, tx.init(start)))
    np.testing.assert_allclose(seen, expected, rtol=1e-6)


def test_the_first_multiplier_step_is_the_learning_rate_whatever_the_error():
    params = jnp.array(1.0)
    for error in (1e-3, 0.5):
        surgery = reference_surgery(error, multiplier_learning_rate=0.3)
        _, state = surgery.update(
            jnp.array(0.0), surgery.init(params), params, losses=jnp.ones(2), value_fn=lambda params: params
        )
        np.testing.assert_allclose(state.multipliers, [0.3], rtol=1e-4)


def test_losses_must_be_positive():
    surgery = reference_surgery()
    with pytest.raises(ValueError, match=r"losses\[0\] = -1 at step 0 \(forget\)"):
        surgery.update(
            jnp.zeros(2), surgery.init(jnp.ones(2)), jnp.ones(2), losses=jnp.array([-1.0, 1.0]), value_fn=jnp.sum
        )


def test_errors_for_each_constraint_fix_their_number():
    tx = reference_surgery(error=jnp.array([0.1, 0.2]))
    assert multipliers(tx.init(jnp.zeros(1))).shape == (2,)
