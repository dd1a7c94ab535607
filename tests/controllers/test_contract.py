"""The contract that every controller keeps."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eupmu_jax import controllers

CONTROLLERS = {
    "nu_pi": controllers.nu_pi(1.0, 0.1, 0.5),
    "augmented_lagrangian": controllers.augmented_lagrangian(1.0, 0.1),
    "quadratic_penalty": controllers.quadratic_penalty(1.0, 1.5),
}
every_controller = pytest.mark.parametrize("controller", CONTROLLERS.values(), ids=CONTROLLERS)


def run(controller, errors):
    """Multipliers after each error, projected to >= 0 as in `implicit_surgery`."""

    def step(carry, error):
        multipliers, state = carry
        moves, state = controller.update(-error, state, multipliers)
        multipliers = jnp.maximum(multipliers + moves, 0)
        return (multipliers, state), multipliers

    start = jnp.ones_like(errors[0])
    return jax.lax.scan(step, (start, controller.init(start)), errors)[1]


@every_controller
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_any_tree_of_multipliers_keeps_its_shapes_and_dtypes(controller, dtype):
    multipliers = {"a": jnp.ones(2, dtype), "b": [jnp.ones((), dtype)]}
    state = controller.init(multipliers)
    moves, new_state = controller.update(multipliers, state, multipliers)
    chex.assert_trees_all_equal_shapes_and_dtypes(moves, multipliers)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)


@pytest.mark.parametrize("name", ["augmented_lagrangian", "quadratic_penalty"])
def test_a_controller_that_reads_the_multipliers_reports_missing_ones(name):
    controller = CONTROLLERS[name]
    with pytest.raises(ValueError, match=r"^params: got None"):
        controller.update(jnp.ones(1), controller.init(jnp.zeros(1)))


@every_controller
def test_vmap_equals_one_after_the_other(controller):
    errors = jnp.asarray(np.random.default_rng(0).normal(size=(4, 12, 3)), jnp.float32)
    together = jax.vmap(lambda errors: run(controller, errors))(errors)
    np.testing.assert_allclose(together, [run(controller, e) for e in errors], rtol=1e-5, atol=1e-6)


def test_every_exported_controller_is_in_the_table():
    of_steps = {"forget_level", "retain_limit", "scale_by_limit"}
    assert set(CONTROLLERS) | of_steps == {name for name in controllers.__all__ if name.islower()}


@every_controller
def test_no_move_takes_a_multiplier_below_0(controller):
    multipliers = jnp.array([0.0, 0.5])
    moves, _ = controller.update(jnp.full(2, 9.0), controller.init(multipliers), multipliers)
    np.testing.assert_array_equal(multipliers + moves, 0)
