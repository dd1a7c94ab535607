import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

from eupmu_jax.methods import METHODS, Terms
from eupmu_jax.methods.boundary_expand import Unit, expanded_logits
from eupmu_jax.tasks import classification

SETTINGS = {"optimizer": "sgd", "learning_rate": 0.5, "momentum": 0.0, "weight_decay": 0.0}


def linear():
    """A procedure for a linear classifier, its weights, and batches whose retain part is NaN and must not be read."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(4, 3)).astype(np.float32)
    images = rng.normal(size=(5, 4)).astype(np.float32)
    batches = {"inputs": images}, {"inputs": np.full((9, 4), np.nan, np.float32)}
    task = classification(lambda params, inputs: inputs @ params, num_classes=3)
    procedure = METHODS["boundary expand"].make(task, Terms(5, 9, 10, 0.0), SETTINGS)
    return procedure._replace(step=jax.jit(procedure.step)), weights, batches


def test_a_step_matches_its_closed_form():
    procedure, weights, batches = linear()
    images = batches[0]["inputs"]
    state = procedure.init(jnp.asarray(weights), ())
    params, (unit, _) = procedure.step(jnp.asarray(weights), (), state, batches, jnp.int32(0), None)
    logits = images @ weights
    p = softmax(np.concatenate([logits, np.zeros((5, 1))], 1), 1)
    gradients = images.T @ p[:, :3] / 5, logits.T @ (p[:, 3] - 1) / 5, (p[:, 3] - 1).mean()
    norm = max(1.0, np.sqrt(sum((g**2).sum() for g in gradients)))
    new, before = (params, unit.weights, unit.bias), (weights, np.zeros(3), 0.0)
    for leaf, old, gradient in zip(new, before, gradients, strict=True):
        np.testing.assert_allclose(leaf, old - 0.5 * gradient / norm, rtol=1e-5, atol=1e-6)


def test_the_added_unit_is_one_of_the_last_layer_with_weights_in_the_span_of_the_others():
    rng = np.random.default_rng(1)
    hidden, weights, bias = rng.normal(size=(7, 5)), rng.normal(size=(5, 3)), rng.normal(size=3)
    unit = Unit(jnp.asarray(rng.normal(size=3)), jnp.asarray(0.3))
    wide = np.column_stack([weights, weights @ unit.weights])
    wide_bias = np.append(bias, bias @ unit.weights + unit.bias)
    found = expanded_logits(jnp.asarray(hidden @ weights + bias), unit)
    np.testing.assert_allclose(found, hidden @ wide + wide_bias, rtol=1e-4, atol=1e-5)


def test_a_unit_that_already_takes_everything_leaves_the_model_unchanged():
    procedure, weights, batches = linear()
    _, optimizer_state = procedure.init(jnp.asarray(weights), ())
    state = Unit(jnp.zeros(3), jnp.asarray(200.0)), optimizer_state
    params, _ = procedure.step(jnp.asarray(weights), (), state, batches, jnp.int32(0), None)
    np.testing.assert_array_equal(params, weights)


@pytest.mark.slow
def test_after_removal_of_the_unit_two_digits_are_forgotten_and_the_others_kept(digits):
    settings = {"learning_rate": 0.03, "momentum": 0.9, "weight_decay": 5e-4}
    params = digits.run("boundary expand", settings, steps=60)
    chex.assert_trees_all_equal_shapes_and_dtypes(params, digits.params)
    assert digits.task.outputs(params, digits.forget.tree, None).shape == (len(digits.forget), 10)
    assert digits.loss(params, digits.forget) > 20 * digits.loss(digits.params, digits.forget)
    assert digits.accuracy(params, digits.forget) < 0.5
    assert digits.accuracy(params, digits.retain) > 0.98
