import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from eupmu_jax.methods.l1_sparse import add_l1
from eupmu_jax.tasks import classification


def test_the_gradient_of_the_norm():
    params = {"a": jnp.array([[1.5, -2.0]]), "b": jnp.array([0.25])}
    loss = lambda p: jnp.sum(jnp.sin(p["a"])) * p["b"][0]
    whole = lambda p: loss(p) + 0.3 * sum(jnp.sum(jnp.abs(leaf)) for leaf in jax.tree.leaves(p))
    actual = add_l1(jax.grad(loss)(params), params, 0.3)
    np.testing.assert_allclose(ravel_pytree(actual)[0], ravel_pytree(jax.grad(whole)(params))[0], rtol=1e-6)
    assert add_l1(jnp.zeros(1), jnp.zeros(1), 0.3).tolist() == [0.0]


def test_weights_that_no_loss_depends_on_shrink_by_a_known_amount(digits):
    """The retain loss is flat there, and alpha and the learning rate both fall linearly to 0."""
    flat = digits._replace(
        task=classification(lambda params, inputs: jnp.zeros((len(inputs), 10)) + 0 * params["x"][0], 10)
    )
    start, steps, alpha, rate = np.array([3.0, -2.0, 0.0]), 4, 0.1, 0.5
    params = flat.run(
        "l1-sparse",
        {"learning_rate": rate, "alpha": alpha, "momentum": 0.0},
        steps=steps,
        params={"x": jnp.asarray(start, jnp.float32)},
    )
    moved = sum(rate * (1 - t / steps) * alpha * (1 - t / steps) for t in range(steps))
    np.testing.assert_allclose(params["x"], start - moved * np.sign(start), rtol=1e-6)


def test_l1_sparsity_forgets_more_than_fine_tuning_and_has_a_smaller_norm(digits):
    common = {"learning_rate": 1.0, "momentum": 0.0}
    tuned = digits.run("fine-tuning", common | {"weight_decay": 0.0}, steps=60)
    sparse = digits.run("l1-sparse", common | {"alpha": 0.01}, steps=60)
    norm = lambda params: float(jnp.abs(ravel_pytree(params)[0]).sum())
    assert norm(sparse) < 0.8 * norm(tuned)
    assert digits.accuracy(sparse, digits.forget) < 0.2 < digits.accuracy(tuned, digits.forget)
    assert digits.accuracy(sparse, digits.retain) > 0.97


def test_without_the_norm_it_equals_fine_tuning(digits):
    common = {"learning_rate": 0.3, "momentum": 0.0}
    tuned = digits.run("fine-tuning", common | {"weight_decay": 0.0}, steps=3)
    sparse = digits.run("l1-sparse", common | {"alpha": 0.0}, steps=3)
    chex.assert_trees_all_close(sparse, tuned, atol=1e-7)
