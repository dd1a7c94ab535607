"""How controllers steer the retain loss over whole runs of `implicit_surgery` and SGD."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from eupmu_jax import implicit_step, implicit_surgery, multipliers
from eupmu_jax.controllers import augmented_lagrangian, nu_pi, quadratic_penalty
from eupmu_jax.tolerances import budget

pytestmark = pytest.mark.slow

ALPHA = 0.05


def squared_error(w, batch):
    return jnp.mean((jnp.tanh(batch["x"] @ w[:3]) * w[3] - batch["y"]) ** 2)


def nonlinear():
    """A forget and a retain regression by one neuron, and where to start."""
    rng = np.random.default_rng(12)
    batches = {"x": jnp.asarray(rng.normal(size=(2, 12, 3))), "y": jnp.asarray(rng.normal(size=(2, 12)))}
    return batches, jnp.asarray(rng.normal(size=4))


def run(loss, batches, start, surgery, steps, alpha=ALPHA):
    """Parameters, multipliers and losses before each step, and the final parameters and multipliers."""
    tx = optax.chain(optax.sgd(alpha), surgery)
    one_step = implicit_step(loss, tx)

    def step(carry, _):
        w, state = carry
        *new, losses = one_step(w, state, batches)
        return tuple(new), (w, multipliers(state), losses)

    (w, state), seen = jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps))((start, tx.init(start)))
    return seen, (w, multipliers(state))


def level_surgery(limit, controller):
    return implicit_surgery(budget(limit, 1.0), controller, proxy="level")


def test_eupmu_is_the_proportional_controller_whatever_the_limit():
    beta = 0.4
    with jax.enable_x64():
        eupmu = implicit_surgery(0.0, optax.sgd(beta), proxy="next_batch", learning_rate=ALPHA)
        expected, _ = run(squared_error, *nonlinear(), eupmu, 300)
        for limit in (-3.0, 0.7):
            proportional = level_surgery(limit, nu_pi(proportional=beta / ALPHA, integral=0.0))
            seen, _ = run(squared_error, *nonlinear(), proportional, 300)
            for actual, desired in zip(seen, expected, strict=True):
                np.testing.assert_allclose(actual, desired, rtol=0, atol=1e-10)
    lam = np.asarray(expected[1])
    assert lam.max() > 0.1
    assert np.any((lam[:-1] > 0) & (lam[1:] == 0))  # The projection is active.


def test_the_integral_controller_is_dual_ascent():
    limit, rate = 0.95, 0.5
    with jax.enable_x64():
        batches, start = nonlinear()

        forget, retain = (jax.tree.map(lambda leaf, k=k: leaf[k], batches) for k in range(2))

        def by_hand(carry, _):
            w, lam = carry
            losses = jnp.stack([squared_error(w, forget), squared_error(w, retain)])
            gradient = jax.grad(squared_error)(w, forget) + lam * jax.grad(squared_error)(w, retain)
            return (w - ALPHA * gradient, jnp.maximum(0, lam + rate * (losses[1] - limit))), (w, lam[None], losses)

        _, expected = jax.jit(lambda carry: jax.lax.scan(by_hand, carry, length=300))((start, jnp.zeros(())))
        for controller in (nu_pi(proportional=0.0, integral=rate), optax.sgd(rate)):
            seen, _ = run(squared_error, batches, start, level_surgery(limit, controller), 300)
            for actual, desired in zip(seen, expected, strict=True):
                np.testing.assert_allclose(actual, desired, rtol=0, atol=1e-10)
    lam = np.asarray(expected[1])
    assert lam.max() > 0.1
    assert np.any((lam[:-1] > 0) & (lam[1:] == 0))


def halves(w, centre):
    return 0.5 * jnp.sum((w - centre) ** 2)


def rest(controller, steps=3000):
    """Final parameters, retain loss and multiplier of a run on two quadratics that starts at its limit of 1/2."""
    with jax.enable_x64():
        centres, start = jnp.array([[2.0, 1.0], [0.0, 0.0]]), jnp.array([0.0, 1.0])
        (_, lam, _), (w, end) = run(halves, centres, start, level_surgery(0.5, controller), steps)
        assert lam[1, 0] == 0  # The start is at the limit, not above it.
        np.testing.assert_allclose(lam[-1], end, rtol=1e-9)
        return np.asarray(w), float(halves(w, centres[1])), float(end[0])


# The KKT conditions are w - (2, 1) + lambda w = 0 and |w| = 1.
SOLUTION, MULTIPLIER = np.array([2.0, 1.0]) / np.sqrt(5), np.sqrt(5) - 1


def test_without_an_integral_part_the_loss_settles_above_its_limit():
    for gain in (2.0, 8.0):
        _, level, lam = rest(nu_pi(proportional=gain, integral=0.0))
        assert lam > 0.1
        np.testing.assert_allclose(level - 0.5, lam / gain, rtol=1e-6)


@pytest.mark.parametrize(
    "controller",
    [
        nu_pi(proportional=2.0, integral=0.1),
        nu_pi(proportional=2.0, integral=0.1, nu=0.5),
        nu_pi(proportional=0.0, integral=0.02),
        augmented_lagrangian(2.0, 0.1),
        augmented_lagrangian(0.5),
    ],
)
def test_with_an_integral_part_a_run_ends_at_the_limit_and_the_solution(controller):
    w, level, lam = rest(controller)
    np.testing.assert_allclose(level, 0.5, rtol=1e-6)
    np.testing.assert_allclose(lam, MULTIPLIER, rtol=1e-6)
    np.testing.assert_allclose(w, SOLUTION, rtol=1e-6)


def test_a_quadratic_penalty_settles_above_the_limit_and_growth_closes_the_gap():
    _, level, lam = rest(quadratic_penalty(2.0, growth=1.0))
    assert lam > 0.1
    np.testing.assert_allclose(level - 0.5, lam / 2.0, rtol=1e-6)
    _, grown, _ = rest(quadratic_penalty(2.0, growth=1.01, violation_tolerance=0.1))
    assert 0.5 < grown < 0.6 < level
