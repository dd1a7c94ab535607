import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from sklearn.linear_model import LogisticRegression

from eupmu_jax import objectives
from eupmu_jax.methods._whole_set import mean_gradient
from eupmu_jax.methods.influence import curvature_product, influence, removal_step
from eupmu_jax.models import conv2d
from eupmu_jax.tasks import as_examples, classification

# The contract of every method is in test_table.
pytestmark = pytest.mark.slow

DAMPING = 0.01


def convolution(params, images):
    return jnp.tanh(conv2d(images, params["kernel"], (2, 2))).reshape(len(images), -1) @ params["head"]


LINEAR = classification(lambda params, images: images.reshape(len(images), -1) @ params, num_classes=10)
CONVOLUTIONAL = classification(convolution, num_classes=10)


def curvature_of(task, params, data, kind):
    """The whole matrix in float64, from Jacobians with respect to the flat parameters."""
    flat, unravel = ravel_pytree(params)
    logits = lambda p: task.outputs(unravel(p), data, None)
    jacobian = np.asarray(jax.jacrev(logits)(flat), np.float64)
    probabilities = np.asarray(jax.nn.softmax(logits(flat)), np.float64)
    count, classes = probabilities.shape
    if kind == "gauss_newton":
        inner = probabilities[:, :, None] * np.eye(classes) - probabilities[:, :, None] * probabilities[:, None]
        return np.einsum("ncp,ncd,ndq->pq", jacobian, inner, jacobian) / count
    gradients = np.einsum("nc,ncp->np", probabilities - np.eye(classes)[data["labels"]], jacobian)
    return gradients.T @ gradients / count


@pytest.fixture(scope="module")
def data(digits):
    everything = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), digits.forget.tree, digits.retain.tree)
    # Average pixels over blocks, so that the weights are few enough for the whole matrix.
    images = everything["inputs"].reshape(-1, 4, 2, 4, 2, 1).mean((2, 4))
    order = np.random.default_rng(0).permutation(len(images))
    return {"inputs": images[order], "labels": everything["labels"][order]}


def part(data, start, stop):
    return {name: array[start:stop] for name, array in data.items()}


@pytest.mark.parametrize("kind", ["gauss_newton", "empirical_fisher"])
@pytest.mark.parametrize("chunks", [1, 4])
@pytest.mark.parametrize("task", [LINEAR, CONVOLUTIONAL], ids=["linear", "convolutional"])
def test_products_are_those_of_the_whole_matrix(data, kind, chunks, task):
    keys = jax.random.split(jax.random.key(0), 3)
    if task is LINEAR:
        params = 0.3 * jax.random.normal(keys[0], (16, 10))
    else:
        params = {
            "kernel": jax.random.normal(keys[0], (3, 3, 1, 2)),
            "head": 0.3 * jax.random.normal(keys[1], (8, 10)),
        }
    sample = part(data, 0, 80)
    vector = jax.tree.map(lambda p: jax.random.normal(keys[2], p.shape), params)
    chunked = {name: array.reshape(chunks, -1, *array.shape[1:]) for name, array in sample.items()}
    actual = ravel_pytree(curvature_product(task, params, chunked, vector, kind))[0]
    expected = curvature_of(task, params, sample, kind) @ np.asarray(ravel_pytree(vector)[0])
    np.testing.assert_allclose(actual, expected, atol=2e-5 * np.abs(expected).max())


def test_the_gauss_newton_matrix_of_a_linear_model_is_the_hessian(data):
    sample = part(data, 0, 80)
    params = 0.3 * jax.random.normal(jax.random.key(0), (16, 10))
    loss = lambda p: objectives.cross_entropy(LINEAR.outputs(p, sample, None), sample["labels"])
    hessian = np.asarray(jax.hessian(loss)(params)).reshape(160, 160)
    np.testing.assert_allclose(curvature_of(LINEAR, params, sample, "gauss_newton"), hessian, atol=1e-6)


@pytest.mark.parametrize("kind", ["gauss_newton", "empirical_fisher"])
def test_the_step_is_the_exact_solution(data, kind):
    forget, retain = part(data, 0, 50), part(data, 50, 450)
    params = 0.3 * jax.random.normal(jax.random.key(0), (16, 10))
    forget = as_examples("forget", forget)
    gradients = [mean_gradient(LINEAR, params, part) for part in (forget, as_examples("retain", retain))]
    gradients = np.asarray(gradients, np.float64).reshape(2, -1)
    matrix = curvature_of(LINEAR, params, retain, kind) + DAMPING * np.eye(160)
    expected = np.linalg.solve(matrix, 50 / 450 * (gradients[0] - gradients[1]))
    step = removal_step(LINEAR, params, forget, retain, 50 / 450, DAMPING, curvature=kind, iterations=200)
    np.testing.assert_allclose(step.ravel(), expected, atol=1e-3 * np.abs(expected).max())


def test_with_a_small_pass_budget_it_uses_fewer_iterations_and_examples(digits):
    settings = {"learning_rate": 1.0, "damping": 0.01, "curvature": "gauss_newton"}
    known = digits.terms(steps=1)
    products = lambda iterations: 3 + 5 * (iterations + 1)
    everything = 3 * known.num_forget + min(1_000, known.num_retain) * products(15)
    step = lambda passes: influence(digits.task, known._replace(passes=passes), settings)
    spent = lambda passes: step(passes).cost.outside_forward + 2 * step(passes).cost.outside_backward
    assert spent(jnp.inf) == spent(everything) == everything
    fewer = 3 * known.num_forget + 103 * products(5)
    assert spent(fewer) == 3 * known.num_forget + 100 * products(5)
    key = jax.random.key(0)
    retain = digits.retain[jax.random.permutation(key, known.num_retain)[:100]]
    share = known.num_forget / (known.num_forget + known.num_retain)
    chex.assert_trees_all_equal(
        step(fewer).prepare(digits.params, digits.forget, digits.retain, key),
        removal_step(digits.task, digits.params, digits.forget, retain, share, 0.01, iterations=5),
    )
    least = 3 * known.num_forget + 4 * products(5)
    assert spent(least) == least
    with pytest.raises(ValueError, match=f"^steps: got a run of {least - 1} passes, expected at least {least}"):
        step(least - 1)


def test_removing_points_from_logistic_regression_approximates_retraining(data):
    """The optimum without the points, found by scikit-learn, against one step from the optimum with them."""

    def optimum(data):
        count = len(data["labels"])
        model = LogisticRegression(C=1 / (DAMPING * count), fit_intercept=False, tol=1e-10, max_iter=10_000)
        return jnp.asarray(model.fit(data["inputs"].reshape(count, -1), data["labels"]).coef_.T, jnp.float32)

    # Remove examples of one class only, unlike a random draw, so that the optimum moves.
    chosen = np.flatnonzero((np.asarray(data["labels"]) == 3) & (np.arange(len(data["labels"])) % 2 == 0))
    rest = np.setdiff1d(np.arange(len(data["labels"])), chosen)
    forget, retain = ({name: array[ids] for name, array in data.items()} for ids in (chosen, rest))
    original, retrained = optimum(data), optimum(retain)
    share = len(chosen) / len(data["labels"])
    unlearned = original + removal_step(
        LINEAR, original, as_examples("forget", forget), retain, share, DAMPING, iterations=200
    )
    distance = lambda params: float(jnp.linalg.norm(params - retrained))
    assert distance(unlearned) < 0.1 * distance(original)


def test_one_step_forgets_a_class_and_the_steps_of_the_run_change_nothing(digits):
    settings = {"learning_rate": 3.0, "damping": 0.01, "curvature": "gauss_newton"}
    # Batches are so large that a few steps cover the pass budget of the preparation.
    run = functools.partial(digits.run, "influence", forget_batch=len(digits.forget), retain_batch=len(digits.retain))
    params = run(settings, steps=20)
    assert digits.accuracy(params, digits.forget) < 0.1
    assert digits.accuracy(params, digits.retain) > 0.97
    chex.assert_trees_all_equal(params, run(settings, steps=25))
    still = run(settings | {"learning_rate": 0.0}, steps=20)
    chex.assert_trees_all_equal(still, digits.params)


def test_there_is_no_step_where_there_is_nothing_to_remove(data):
    params = jnp.zeros((16, 10))
    same = part(data, 0, 100)
    step = removal_step(LINEAR, params, as_examples("forget", same), same, 0.5, DAMPING)
    assert not np.any(step)


def test_bad_arguments_of_the_removal_step_are_named(data):
    params, sample = jnp.zeros((16, 10)), part(data, 0, 4)
    forget = as_examples("forget", sample)
    with pytest.raises(ValueError, match=r"^damping: got 0\.0, expected a positive number"):
        removal_step(LINEAR, params, forget, sample, 0.5, 0.0)
    with pytest.raises(ValueError, match=r"^curvature: got 'round', expected 'gauss_newton' or 'empirical_fisher'"):
        removal_step(LINEAR, params, forget, sample, 0.5, 1.0, curvature="round")
