import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra.numpy import arrays

from eupmu_jax.controllers import quadratic_penalty

# XLA rounds subnormal numbers to 0, and NumPy does not.
errors_of_a_run = arrays(np.float64, (12, 3), elements=st.floats(-2, 2, allow_subnormal=False))


@jax.jit
def run(errors, start, penalty, growth, violation_tolerance):
    """Multipliers after each error, projected to >= 0 as in `implicit_surgery`, and the last state."""
    controller = quadratic_penalty(penalty, growth, violation_tolerance)

    def step(carry, error):
        multipliers, state = carry
        moves, state = controller.update(-error, state, multipliers)
        multipliers = jnp.maximum(multipliers + moves, 0)
        return (multipliers, state), multipliers

    (_, state), multipliers = jax.lax.scan(step, (start, controller.init(start)), errors)
    return multipliers, state


@given(
    errors_of_a_run, st.sampled_from([0.1, 2.0]), st.sampled_from([1.0, 1.5]), st.sampled_from([-0.5, 0.0, 1e-4, 1.0])
)
def test_the_penalty_weights_the_violation_and_grows_with_it(errors, penalty, growth, violation_tolerance):
    rho, expected = np.full(3, penalty), []
    for e in errors:
        expected.append(rho * np.maximum(e, 0))
        rho = np.where(e > violation_tolerance, growth * rho, rho)

    with jax.enable_x64():
        start = jnp.array([0.0, 1.0, 5.0])
        seen, state = run(jnp.asarray(errors), start, penalty, growth, violation_tolerance)
    np.testing.assert_allclose(seen, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(state.penalty, rho, rtol=1e-12)


def test_each_constraint_can_have_its_own_penalty():
    multipliers, state = run(jnp.array([[0.5, 0.5]]), jnp.zeros(2), jnp.array([1.0, 2.0]), 2.0, 0.0)
    np.testing.assert_allclose(multipliers, [[0.5, 1.0]])
    np.testing.assert_allclose(state.penalty, [2.0, 4.0])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"penalty": 0.0}, r"^penalty: got 0.0, expected a finite positive number"),
        ({"penalty": float("nan")}, r"^penalty: got nan"),
        ({"penalty": np.array([1.0, -1.0])}, r"^penalty: got \["),
        ({"growth": 0.99}, r"^growth: got 0.99, expected a finite number >= 1"),
        ({"growth": float("nan")}, r"^growth: got nan"),
    ],
)
def test_the_factory_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        quadratic_penalty(**{"penalty": 1.0, **kwargs})


def test_the_penalty_stays_finite():
    controller, multiplier = quadratic_penalty(penalty=1.0, growth=1e6), jnp.zeros(1)
    state = controller.init(multiplier)
    for _ in range(20):
        move, state = controller.update(-jnp.ones(1), state, multiplier)
        multiplier = multiplier + move
    assert 1e18 < float(state.penalty[0]) < 1e20
    assert np.isfinite(multiplier).all()


def test_a_penalty_beyond_the_bound_of_growth_never_falls():
    controller, multiplier = quadratic_penalty(penalty=1e20, growth=2.0), jnp.zeros(1)
    _, state = controller.update(-jnp.full(1, 1e-3), controller.init(multiplier), multiplier)
    np.testing.assert_allclose(state.penalty, 1e20, rtol=1e-6)
