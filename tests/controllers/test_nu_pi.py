import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra.numpy import arrays

from eupmu_jax.controllers import nu_pi

errors_of_a_run = arrays(np.float64, (12, 3), elements=st.floats(-2, 2, allow_subnormal=False))
gains = st.sampled_from([0.0, 0.3, 4.0])


@jax.jit
def run(errors, start, proportional, integral, nu):
    """Multipliers after each error, projected to >= 0 as in `implicit_surgery`, and the last state."""
    controller = nu_pi(proportional, integral, nu)

    def step(carry, error):
        multipliers, state = carry
        moves, state = controller.update(-error, state, multipliers)
        multipliers = jnp.maximum(multipliers + moves, 0)
        return (multipliers, state), multipliers

    (_, state), multipliers = jax.lax.scan(step, (start, controller.init(start)), errors)
    return multipliers, state


@given(errors_of_a_run, gains, gains, st.sampled_from([-0.5, 0.0, 0.9]))
def test_multipliers_follow_the_recursion_of_the_paper(errors, proportional, integral, nu):
    multiplier = start = np.array([0.0, 1.0, 5.0])
    average, expected = errors[0], []
    for e in errors:
        smoothed = nu * average + (1 - nu) * e
        multiplier = np.maximum(0, multiplier + integral * e + proportional * (smoothed - average))
        average = smoothed
        expected.append(multiplier)

    with jax.enable_x64():
        seen, state = run(jnp.asarray(errors), jnp.asarray(start), proportional, integral, nu)
    np.testing.assert_allclose(seen, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(state.average, average, rtol=1e-12, atol=1e-12)
    assert state.count == len(errors)


def test_the_first_error_moves_only_the_integral_part():
    controller = nu_pi(proportional=100.0, integral=0.5, nu=0.9)
    moves, _ = controller.update(-jnp.array([0.5]), controller.init(jnp.zeros(1)), jnp.zeros(1))
    np.testing.assert_allclose(moves, [0.25])


def test_a_long_time_below_the_limit_does_not_wind_up_the_integral():
    errors = jnp.concatenate([jnp.full((1000, 1), -1.0), jnp.full((2, 1), 0.5)])
    multipliers, _ = run(errors, jnp.array([3.0]), 2.0, 1.0, 0.0)
    np.testing.assert_array_equal(multipliers[3:1000], 0)
    np.testing.assert_allclose(multipliers[-2:, 0], [0.5 + 2 * 1.5, 3.5 + 0.5])


def test_each_constraint_can_have_its_own_gain():
    errors = jnp.array([[0.5, 0.5], [1.0, 1.0]])
    multipliers, _ = run(errors, jnp.zeros(2), jnp.array([0.0, 2.0]), jnp.array([1.0, 0.5]), 0.0)
    np.testing.assert_allclose(multipliers, [[0.5, 0.25], [1.5, 1.75]])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"proportional": -1.0}, r"^proportional: got -1.0"),
        ({"proportional": float("nan")}, r"^proportional: got nan"),
        ({"integral": np.array([0.1, -0.1])}, r"^integral: got \["),
        ({"nu": 1.0}, r"^nu: got 1.0"),
        ({"nu": -1.0}, r"^nu: got -1.0"),
        ({"nu": float("nan")}, r"^nu: got nan"),
    ],
)
def test_the_factory_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        nu_pi(**{"proportional": 1.0, "integral": 1.0, **kwargs})
