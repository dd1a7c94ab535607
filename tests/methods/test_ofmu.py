import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import approx_fprime

from eupmu_jax import objectives
from eupmu_jax.methods import METHODS, Terms
from eupmu_jax.methods.ofmu import INNER_STEPS, cosine_weights, directions
from eupmu_jax.tasks import classification

pytestmark = pytest.mark.slow

SIZE = 5
SETTINGS = {"learning_rate": 0.3, "beta": 0.5, "rho": 0.2}


def quadratics(seed):
    """The Hessians and minima of a forget and a retain loss, and a point."""
    rng = np.random.default_rng(seed)
    roots = rng.normal(size=(2, SIZE, SIZE))
    return roots @ roots.transpose(0, 2, 1), rng.normal(size=(2, SIZE)), rng.normal(size=SIZE)


def as_loss(hessian, minimum):
    """The quadratic as a function of a tree with two leaves."""

    def loss(params):
        apart = jnp.concatenate([params["a"], params["b"].ravel()]) - minimum
        return 0.5 * apart @ hessian @ apart

    return loss


def flat(tree):
    return np.concatenate([np.asarray(tree["a"]), np.asarray(tree["b"]).ravel()])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("beta", [0.0, 0.7])
def test_both_gradients_of_quadratics(seed, beta):
    hessians, minima, point = quadratics(seed)
    params = {"a": jnp.asarray(point[:2]), "b": jnp.asarray(point[2:])[:, None]}
    found = jax.jit(functools.partial(directions, *map(as_loss, hessians, minima)))(params, beta, 0.3)

    def phi(x):
        forget, retain = (h @ (x - m) for h, m in zip(hessians, minima, strict=True))
        cosine = forget @ retain / np.linalg.norm(forget) / np.linalg.norm(retain)
        return 0.5 * (x - minima[0]) @ forget - beta * cosine

    gradient = approx_fprime(point, phi, 1e-7)
    outer = hessians[1] @ (point - minima[1]) + 2 * 0.3 * hessians[0] @ gradient
    np.testing.assert_allclose(flat(found[0]), gradient, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(flat(found[1]), outer, rtol=1e-3, atol=1e-2)


def test_without_the_cosine_the_outer_gradient_is_exact():
    rng = np.random.default_rng(0)
    images, labels = jnp.asarray(rng.normal(size=(6, 3))), jnp.asarray(rng.integers(4, size=6))
    forget = lambda w: objectives.cross_entropy(images[:3] @ w, labels[:3])
    retain = lambda w: objectives.cross_entropy(images[3:] @ w, labels[3:])
    outer = lambda w: retain(w) + 0.4 * jnp.sum(jax.grad(forget)(w) ** 2)
    point = jnp.asarray(rng.normal(size=(3, 4)))
    found = directions(forget, retain, point, 0.0, 0.4)
    np.testing.assert_allclose(found[0], jax.grad(forget)(point), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[1], jax.grad(outer)(point), rtol=1e-4, atol=1e-5)


def test_a_hessian_vector_product_counts_as_two_forward_and_two_backward_passes():
    width, depth = 128, 6
    params = [jnp.full((width, width), 0.01)] * depth

    def loss(scale, size):
        def of(weights):
            outputs = jnp.full((size, width), scale)
            for w in weights:
                outputs = jnp.tanh(outputs) @ w
            return jnp.mean(outputs**2)

        return of

    def operations(function):
        return jax.jit(function).lower(params).compile().cost_analysis()["flops"]

    # A batch of one example costs almost nothing, so only the cost of the other batch is measured.
    forget, retain, one = loss(0.5, 256), loss(0.4, 256), loss(0.3, 1)
    plain = operations(lambda p: (jax.grad(forget)(p), jax.grad(one)(p)))
    prices = [
        operations(lambda p, k=k, pair=pair: directions(*pair, p, 0.1, 0.1)[k]) / plain
        for k, pair in ((0, (forget, one)), (0, (one, retain)), (1, (forget, one)), (1, (one, retain)))
    ]
    # The first layer needs less differentiation, so a product costs the full factor of 2 only in deep networks.
    product = (6 * depth - 4) / (3 * depth - 1)
    np.testing.assert_allclose(prices, [1 + product, 1 + product, 1 + 2 * product, 1 + product], rtol=0.05)


@pytest.mark.parametrize("zero", [0, 1])
def test_without_a_gradient_there_is_no_cosine(zero):
    hessians, minima, point = quadratics(0)
    minima[zero] = point
    params = {"a": jnp.asarray(point[:2]), "b": jnp.asarray(point[2:])}
    inner, outer = directions(*map(as_loss, hessians, minima), params, 0.7, 0.3)
    gradients = [h @ (point - m) for h, m in zip(hessians, minima, strict=True)]
    np.testing.assert_allclose(flat(inner), gradients[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(flat(outer), gradients[1] + 0.6 * hessians[0] @ gradients[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_the_cosine_does_not_depend_on_the_scale_of_the_gradients(scale):
    rows = np.random.default_rng(0).normal(size=(2, 4))
    cosine = lambda r: r[0] @ r[1] / np.linalg.norm(r[0]) / np.linalg.norm(r[1])
    derivative = approx_fprime(rows.ravel(), lambda r: cosine(r.reshape(2, 4)), 1e-7).reshape(2, 4)
    weights = cosine_weights(jnp.asarray(scale**2 * rows @ rows.T))
    np.testing.assert_allclose(np.asarray(weights, np.float64) @ (scale * rows), derivative / scale, rtol=1e-3)


def linear(labels_of_forget):
    """A procedure for a linear classifier of four classes, its weights and batches."""
    rng = np.random.default_rng(0)
    weights = jnp.asarray(3 * rng.normal(size=(6, 4)))
    images = [jnp.asarray(rng.normal(size=(n, 6))) for n in (5, 9)]
    labels = labels_of_forget(images[0] @ weights, -1), jnp.asarray(rng.integers(4, size=9))
    batches = tuple({"inputs": x, "labels": y} for x, y in zip(images, labels, strict=True))
    task = classification(lambda params, inputs: inputs @ params, num_classes=4)
    procedure = METHODS["OFMU"].make(task, Terms(5, 9, 10, 0.0), SETTINGS)
    return procedure._replace(step=jax.jit(procedure.step)), weights, batches


def clip(tree):
    return tree / np.maximum(1.0, np.linalg.norm(tree))


def losses(batches):
    forget, retain = batches
    return (
        lambda w: -objectives.bounded_ascent(forget["inputs"] @ w, forget["labels"]),
        lambda w: objectives.cross_entropy(retain["inputs"] @ w, retain["labels"]),
    )


def test_examples_that_are_forgotten_already_are_left_alone():
    procedure, weights, batches = linear(jnp.argmin)
    params, _ = procedure.step(weights, (), procedure.init(weights, ()), batches, jnp.int32(0), None)
    expected = weights - 0.3 * clip(jax.grad(losses(batches)[1])(weights))
    np.testing.assert_allclose(params, expected, rtol=1e-5, atol=1e-6)


def test_a_step_is_several_ascents_followed_by_a_descent_with_a_rising_penalty():
    procedure, weights, batches = linear(jnp.argmax)
    params, state, expected = weights, procedure.init(weights, ()), weights
    follow = jax.jit(functools.partial(directions, *losses(batches)))
    for count in range(3):
        params, state = procedure.step(params, (), state, batches, jnp.int32(count), None)
        rate = 0.3 * (1 - count / 10)
        for _ in range(INNER_STEPS):
            expected = expected + rate * clip(follow(expected, 0.5, 0.0)[0])
        expected = expected - rate * clip(follow(expected, 0.5, 0.02 * (count + 1))[1])
        np.testing.assert_allclose(params, expected, rtol=1e-4, atol=1e-4)


def test_ofmu_forgets_two_digits_and_keeps_the_others(digits):
    params = digits.run("OFMU", {"learning_rate": 0.1, "beta": 0.1, "rho": 0.1}, steps=60)
    assert digits.accuracy(params, digits.forget) < 0.1
    assert digits.accuracy(params, digits.retain) > 0.98
