import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra.numpy import arrays

from eupmu_jax.controllers import augmented_lagrangian

errors_of_a_run = arrays(np.float64, (12, 3), elements=st.floats(-2, 2, allow_subnormal=False))
START = np.array([0.0, 1.0, 5.0])


@jax.jit
def run(errors, start, penalty, dual_learning_rate):
    """Multipliers, projected to >= 0 as in `implicit_surgery`, and their estimates after each error."""
    controller = augmented_lagrangian(penalty, dual_learning_rate)

    def step(carry, error):
        multipliers, state = carry
        moves, state = controller.update(-error, state, multipliers)
        multipliers = jnp.maximum(multipliers + moves, 0)
        return (multipliers, state), (multipliers, state.dual)

    return jax.lax.scan(step, (start, controller.init(start)), errors)[1]


@given(errors_of_a_run, st.sampled_from([0.1, 2.0]), st.sampled_from([None, 0.0, 0.5]))
def test_multipliers_follow_the_recursion_of_powell_hestenes_and_rockafellar(errors, penalty, dual_learning_rate):
    duals, expected = [START], []
    for e in errors:
        duals.append(np.maximum(0, duals[-1] + (penalty if dual_learning_rate is None else dual_learning_rate) * e))
        expected.append(np.maximum(0, duals[-1] + penalty * e))

    with jax.enable_x64():
        seen, seen_duals = run(jnp.asarray(errors), jnp.asarray(START), penalty, dual_learning_rate)
    np.testing.assert_allclose(seen, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(seen_duals, duals[1:], rtol=1e-12, atol=1e-12)


@jax.jit
@jax.vmap
@jax.vmap
def derivative(error, dual, penalty):
    return jax.grad(lambda e: (jnp.maximum(dual + penalty * e, 0) ** 2 - dual**2) / (2 * penalty))(error)


@given(errors_of_a_run, st.sampled_from([0.1, 2.0]))
def test_the_multiplier_is_the_derivative_of_the_augmented_lagrangian(errors, penalty):
    with jax.enable_x64():
        errors = jnp.asarray(errors)
        multipliers, duals = run(errors, jnp.asarray(START), penalty, 0.5)
        expected = derivative(errors, duals, jnp.full_like(errors, penalty))
    np.testing.assert_allclose(multipliers, expected, rtol=1e-12, atol=1e-12)


def test_the_estimate_starts_at_the_initial_multiplier_and_survives_its_donation():
    controller, multipliers = augmented_lagrangian(1.0), jnp.array([2.0, 3.0])
    state = controller.init(multipliers)
    jax.jit(lambda multipliers: multipliers + 1, donate_argnums=0)(multipliers)
    np.testing.assert_array_equal(state.dual, [2.0, 3.0])


def test_each_constraint_can_have_its_own_penalty():
    multipliers, _ = run(jnp.array([[0.5, 0.5]]), jnp.zeros(2), jnp.array([1.0, 2.0]), jnp.array([0.0, 1.0]))
    np.testing.assert_allclose(multipliers, [[0.5, 1.5]])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"penalty": 0.0}, r"^penalty: got 0.0"),
        ({"penalty": float("nan")}, r"^penalty: got nan"),
        ({"penalty": np.array([1.0, -1.0])}, r"^penalty: got \["),
        ({"dual_learning_rate": -0.1}, r"^dual_learning_rate: got -0.1"),
        ({"dual_learning_rate": float("nan")}, r"^dual_learning_rate: got nan"),
    ],
)
def test_the_factory_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        augmented_lagrangian(**{"penalty": 1.0, **kwargs})
