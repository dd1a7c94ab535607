import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from eupmu_jax.methods.zeroth_order import estimate
from eupmu_jax.tasks import classification

# The contract of every method is in test_table.
pytestmark = pytest.mark.slow

SETTINGS = {"learning_rate": 1.0, "forget_objective": "bounded_ascent", "retain_weight": 3.0}


def quadratic(params):
    return 2 * (params["a"][0] - 1) ** 2 + params["a"][0] * params["a"][1] + jnp.sum(params["b"] ** 2)


PARAMS = {"a": jnp.array([0.5, -1.0]), "b": jnp.array([[2.0], [0.25]])}


@pytest.mark.parametrize("smoothing", [0.01, 1.0])
def test_on_a_quadratic_the_expected_estimate_is_the_gradient_whatever_the_smoothing(smoothing):
    directions = 20_000
    gradient = np.asarray(ravel_pytree(jax.grad(quadratic)(PARAMS))[0])
    mean = ravel_pytree(estimate(quadratic, PARAMS, jax.random.key(0), smoothing, directions))[0]
    # The variance of (g'z) z_i is |g|^2 + g_i^2.
    deviation = np.sqrt((gradient @ gradient + gradient**2) / directions)
    assert np.all(np.abs(mean - gradient) < 4 * deviation)
    assert np.all(np.abs(gradient) > 8 * deviation), "or the test could not tell the signs"


def test_one_direction_gives_the_derivative_along_it():
    flat = ravel_pytree(estimate(quadratic, PARAMS, jax.random.key(1), 0.01, 1))[0]
    gradient = ravel_pytree(jax.grad(quadratic)(PARAMS))[0]
    # The estimate is rho z with rho = g'z, so g'(rho z) = rho^2, and z is the estimate divided by rho.
    rho = jnp.sqrt(gradient @ flat)
    np.testing.assert_allclose(gradient @ (flat / rho), rho, rtol=1e-3)
    assert 0.3 < jnp.linalg.norm(flat / rho) / 2 < 2


def test_the_length_of_a_step_is_the_learning_rate(digits):
    params = digits.run("ZO-signGD", SETTINGS | {"learning_rate": 0.2}, steps=1)
    moved = np.asarray(ravel_pytree(params)[0] - ravel_pytree(digits.params)[0])
    assert np.linalg.norm(moved) == pytest.approx(0.2, rel=1e-3)
    np.testing.assert_allclose(np.abs(moved), 0.2 / np.sqrt(len(moved)), rtol=1e-2)


def test_differences_that_round_to_zero_give_no_step(digits):
    params = digits.run("ZO-signGD", SETTINGS | {"smoothing": 1e-12}, steps=2)
    chex.assert_trees_all_equal(params, digits.params)


def test_a_model_that_can_only_be_evaluated_forgets(digits):
    """The model is a callback that has no derivative."""

    def evaluate(params, images):
        # JAX operations in here would deadlock, waiting for the step that waits for this callback.
        images, first, second = map(np.asarray, (images, params["w"], params["v"]))
        return (np.maximum(images.reshape(len(images), -1) @ first, 0) @ second).astype(np.float32)

    def apply(params, images):
        shape = jax.ShapeDtypeStruct((len(images), 10), jnp.float32)
        return jax.pure_callback(evaluate, shape, params, images, vmap_method="sequential")

    layers = digits.params["layers"]
    params = {"w": layers[0]["kernel"], "v": layers[1]["kernel"]}
    black_box = digits._replace(task=classification(apply, num_classes=10))
    with pytest.raises(ValueError, match="Pure callbacks do not support"):
        jax.grad(lambda p: apply(p, digits.forget.tree["inputs"]).sum())(params)
    unlearned = black_box.run("ZO-signGD", SETTINGS, steps=60, params=params)
    assert black_box.accuracy(unlearned, digits.forget) < black_box.accuracy(params, digits.forget) - 0.3
    assert black_box.accuracy(unlearned, digits.retain) > 0.9


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_an_estimate_has_the_dtype_of_its_parameter(dtype):
    # BUG: the float32 loss widened the sum, and the loop over the directions raised a TypeError.
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), PARAMS)
    found = estimate(quadratic, params, jax.random.key(0), jnp.float32(0.1), 3)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, params)
    assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(found))
