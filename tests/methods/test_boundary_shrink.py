import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from scipy.special import softmax

from eupmu_jax.methods import METHODS, Terms
from eupmu_jax.methods.boundary_shrink import nearest_wrong_labels
from eupmu_jax.tasks import as_examples, classification

# The contract of every method is in test_table.
pytestmark = pytest.mark.slow


def linear(params, inputs):
    return inputs @ params[0] + params[1]


TASK = classification(linear, num_classes=4)
_nearest = jax.jit(functools.partial(nearest_wrong_labels, TASK.outputs))


@given(st.integers(0, 10_000))
def test_the_label_is_the_class_behind_the_nearest_boundary_of_a_linear_model(seed):
    # The classes share no pixel, so the sign step moves towards every class at the rate of its 1-norm. The first
    # boundary crossed is then the nearest in the max-norm: (z_0 - z_k) / |w_k - w_0|_1.
    rng = np.random.default_rng(seed)
    weights, image = np.zeros((20, 5)), np.full(20, 0.5)
    cuts = np.sort(rng.choice(np.arange(1, 20), 3, replace=False))
    for k, pixels in enumerate(np.split(np.arange(20), cuts), start=1):
        weights[pixels, k] = rng.uniform(0.5, 2, len(pixels)) * rng.choice([-1, 1], len(pixels))
    distances = rng.permutation([0.1, 0.15, 0.2, 0.25])
    bias = np.zeros(5)
    bias[1:] = -image @ weights[:, 1:] - distances * np.abs(weights[:, 1:]).sum(0)
    batch = {"inputs": jnp.asarray(image, jnp.float32)[None], "labels": jnp.zeros(1, jnp.int32)}
    params = jnp.asarray(weights, jnp.float32), jnp.asarray(bias, jnp.float32)
    found = _nearest(params, batch, 0.12)
    assert found.tolist() == [1 + np.argmin(distances)]


@given(st.integers(0, 10_000), st.floats(0.0, 0.5))
def test_the_label_is_never_the_true_one(seed, bound):
    rng = np.random.default_rng(seed)
    params = jnp.asarray(10 * rng.normal(size=(6, 4))), jnp.asarray(rng.normal(size=4))
    labels = rng.integers(4, size=20)
    batch = {"inputs": jnp.asarray(rng.uniform(size=(20, 6))), "labels": jnp.asarray(labels)}
    assert not (np.asarray(_nearest(params, batch, bound)) == labels).any()


@pytest.mark.parametrize(("bias", "label"), [(-10.05, 2), (-9.8, 1)], ids=["beyond 1", "below 1"])
def test_images_stay_between_0_and_1(bias, label):
    # A step from 0.95 to 1.05 would cross both boundaries of class 1; a step clipped at 1 crosses only the second.
    params = jnp.array([[0.0, 10.0, 0.0], [0.0, 0.0, 1.0]]), jnp.array([0.0, bias, -0.55])
    batch = {"inputs": jnp.array([[0.95, 0.5]]), "labels": jnp.zeros(1, jnp.int32)}
    assert nearest_wrong_labels(TASK.outputs, params, batch, 0.1).tolist() == [label]


def test_a_step_learns_the_labels_of_the_original_model_from_the_forget_batch_only():
    rng = np.random.default_rng(1)
    original, student = (
        tuple(jnp.asarray(leaf, jnp.float32) for leaf in (10 * rng.normal(size=(6, 4)), rng.normal(size=4)))
        for _ in range(2)
    )
    images, labels = rng.uniform(size=(8, 6)), rng.integers(4, size=8)
    forget = {"inputs": jnp.asarray(images, jnp.float32), "labels": jnp.asarray(labels)}
    retain = {"inputs": jnp.full((3, 6), jnp.nan), "labels": jnp.zeros(3, jnp.int32)}
    settings = {"optimizer": "sgd", "learning_rate": 0.5, "bound": 0.2, "momentum": 0.0}
    procedure = METHODS["boundary shrink"].make(TASK, Terms(8, 3, 10, 0.0), settings)
    prepared = procedure.prepare(original, *(as_examples("set", batch) for batch in (forget, retain)), None)
    state = procedure.init(student, prepared)
    params, _ = jax.jit(procedure.step)(student, prepared, state, (forget, retain), jnp.int32(0), None)

    taught = np.asarray(nearest_wrong_labels(TASK.outputs, original, forget, 0.2))
    assert (taught != np.asarray(nearest_wrong_labels(TASK.outputs, student, forget, 0.2))).any()
    error = (softmax(np.asarray(linear(student, forget["inputs"])), 1) - np.eye(4)[taught]) / 8
    gradients = images.T @ error, error.sum(0)
    norm = max(1.0, np.sqrt(sum((g**2).sum() for g in gradients)))
    for new, old, gradient in zip(params, student, gradients, strict=True):
        np.testing.assert_allclose(new, old - 0.5 * gradient / norm, rtol=1e-5, atol=1e-5)


def test_two_digits_move_to_their_neighbouring_classes_and_the_others_are_kept(digits):
    settings = {"learning_rate": 0.03, "bound": 0.1, "momentum": 0.0}
    params = digits.run("boundary shrink", settings, steps=60)
    neighbours = nearest_wrong_labels(digits.task.outputs, digits.params, digits.forget.tree, 0.1)
    taught = as_examples("taught", digits.forget.tree | {"labels": neighbours})
    assert digits.accuracy(params, digits.forget) < 0.3
    assert digits.accuracy(digits.params, taught) < 0.05
    assert digits.accuracy(params, taught) > 0.4
    assert digits.accuracy(params, digits.retain) > 0.98
