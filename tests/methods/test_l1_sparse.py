import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from eupmu_jax.methods.fine_tuning import fine_tuning
from eupmu_jax.methods.l1_sparse import add_l1, l1_sparse


def test_the_gradient_of_the_norm():
    params = {"a": jnp.array([[1.5, -2.0]]), "b": jnp.array([0.25])}
    loss = lambda p: jnp.sum(jnp.sin(p["a"])) * p["b"][0]
    whole = lambda p: loss(p) + 0.3 * sum(jnp.sum(jnp.abs(leaf)) for leaf in jax.tree.leaves(p))
    actual = add_l1(jax.grad(loss)(params), params, 0.3)
    np.testing.assert_allclose(ravel_pytree(actual)[0], ravel_pytree(jax.grad(whole)(params))[0], rtol=1e-6)
    assert add_l1(jnp.zeros(1), jnp.zeros(1), 0.3).tolist() == [0.0]


def test_weights_that_no_loss_depends_on_shrink_by_a_known_amount(problem):
    """Where the retain loss is flat: alpha and the learning rate both fall linearly to 0."""
    flat = problem._replace(
        problem=problem.problem._replace(apply=lambda params, images: jnp.zeros((len(images), 10)) + 0 * params["x"][0])
    )
    start, steps, alpha, rate = np.array([3.0, -2.0, 0.0]), 4, 0.1, 0.5
    params = flat.run(
        l1_sparse,
        {"learning_rate": rate, "alpha": alpha, "momentum": 0.0},
        steps=steps,
        params={"x": jnp.asarray(start, jnp.float32)},
    )
    moved = sum(rate * (1 - t / steps) * alpha * (1 - t / steps) for t in range(steps))
    np.testing.assert_allclose(params["x"], start - moved * np.sign(start), rtol=1e-6)


def test_it_forgets_more_than_fine_tuning_and_has_a_smaller_norm(problem):
    common = {"learning_rate": 1.0, "momentum": 0.0}
    tuned = problem.run(fine_tuning, common | {"weight_decay": 0.0}, steps=60)
    sparse = problem.run(l1_sparse, common | {"alpha": 0.01}, steps=60)
    norm = lambda params: float(jnp.abs(ravel_pytree(params)[0]).sum())
    assert norm(sparse) < 0.8 * norm(tuned)
    assert problem.accuracy(sparse, problem.forget) < 0.2 < problem.accuracy(tuned, problem.forget)
    assert problem.accuracy(sparse, problem.retain) > 0.97


def test_without_a_norm_it_is_fine_tuning(problem):
    common = {"learning_rate": 0.3, "momentum": 0.0}
    tuned = problem.run(fine_tuning, common | {"weight_decay": 0.0}, steps=3)
    sparse = problem.run(l1_sparse, common | {"alpha": 0.0}, steps=3)
    chex.assert_trees_all_close(sparse, tuned, atol=1e-7)
