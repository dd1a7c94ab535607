"""Gradients of weighted sums of losses, in raw and log scale, and the losses that multipliers are measured on."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eupmu_jax import (
    retain_losses,
    scalarized_value_and_grad,
    stacked_value_and_grad,
)

from .test_value_and_grad import ascent, batch, count_primitive, looped, mlp, shared, squared


def test_a_scalarised_gradient_is_one_backward_pass():
    params, batches = mlp(), (batch(4, 0), batch(4, 1))
    scalarised = count_primitive("dot_general", scalarized_value_and_grad(squared), params, batches, jnp.ones(1))
    total = jax.grad(lambda p: squared(p, batches[0]) + squared(p, batches[1]))
    assert scalarised <= count_primitive("dot_general", total, params)  # Half as many if the objectives are vmapped.


@pytest.mark.parametrize("sizes", [(4, 4, 4), (4, 36, 7)], ids=str)
@pytest.mark.parametrize("scale", ["raw", "log"])
def test_scalarised_equals_grad_of_the_formula(sizes, scale):
    params, batches = mlp(), tuple(batch(size, seed) for seed, size in enumerate(sizes))
    multipliers = jnp.array([0.5, 2.0])
    log = (lambda x: jnp.log(x + 1e-8)) if scale == "log" else (lambda x: x)

    def formula(params):
        losses = [squared(params, b) for b in batches]
        return log(losses[0]) + 0.5 * log(losses[1]) + 2.0 * log(losses[2])

    losses, grads = jax.jit(scalarized_value_and_grad(squared, loss_scale=scale))(params, batches, multipliers)
    np.testing.assert_allclose(losses, [squared(params, b) for b in batches], rtol=1e-5)
    chex.assert_trees_all_close(grads, jax.grad(formula)(params), rtol=1e-4, atol=1e-6)


def test_scalarised_takes_different_losses_and_a_scalar_multiplier():
    params, batches = mlp(), (batch(4, 0), batch(36, 1))
    for loss in ([ascent, squared], shared):
        losses, grads = scalarized_value_and_grad(loss)(params, batches, jnp.array(0.5))
        expected_losses, expected = looped([ascent, squared], params, batches)
        np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
        chex.assert_trees_all_close(grads, jax.tree.map(lambda g: g[0] + 0.5 * g[1], expected), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", ["raw", "log"])
def test_negative_multipliers_count_as_zero(scale):
    value_and_grad = scalarized_value_and_grad(squared, loss_scale=scale)
    params, batches = mlp(), (batch(4, 0), batch(4, 1))
    negative, zero = (value_and_grad(params, batches, jnp.array([m])) for m in (-3.0, 0.0))
    chex.assert_trees_all_equal(negative, zero)


def test_multipliers_are_constants():
    value_and_grad = scalarized_value_and_grad(lambda params, x: jnp.mean(params * x))
    batches = jnp.ones((2, 3))
    _, grads = value_and_grad(jnp.array(2.0), batches, jnp.array([3.0]))
    _, tied = jax.value_and_grad(lambda p: value_and_grad(jnp.array(2.0), batches, jnp.array([p]))[0].sum())(3.0)
    assert float(grads) == 4.0
    assert float(tied) == 0.0


def test_scalarised_aux_gains_an_objective_axis():
    def loss(params, b):
        return (squared(params, b), jnp.mean(b[0]))

    batches = (batch(4, 0), batch(36, 1))
    (losses, aux), _ = scalarized_value_and_grad(loss, has_aux=True)(mlp(), batches, jnp.ones(1))
    chex.assert_shape((losses, aux), (2,))
    np.testing.assert_allclose(aux, [b[0].mean() for b in batches], rtol=1e-6)


def test_scalarised_refuses_wrong_arguments():
    with pytest.raises(ValueError, match=r"^loss_scale: got 'ln'"):
        scalarized_value_and_grad(squared, loss_scale="ln")
    batches = (batch(4, 0), batch(4, 1))
    with pytest.raises(ValueError, match=r"^multipliers: got shape \(2,\), expected \(1,\)"):
        scalarized_value_and_grad(squared)(mlp(), batches, jnp.ones(2))


def test_a_loss_that_is_not_positive_makes_log_scale_gradients_nan():
    value_and_grad = jax.jit(scalarized_value_and_grad([ascent, squared], loss_scale="log"))
    losses, grads = value_and_grad(mlp(), (batch(4, 0), batch(4, 1)), jnp.ones(1))
    assert losses[0] < 0
    assert jax.tree.all(jax.tree.map(lambda g: jnp.all(jnp.isnan(g)), grads))


def test_retain_losses_are_the_losses_without_the_first():
    params, batches = mlp(), tuple(batch(size, size) for size in (4, 36, 9))
    expected = [squared(params, b) for b in batches[1:]]
    np.testing.assert_allclose(retain_losses(squared, params, batches), expected, rtol=1e-6)

    def with_aux(params, b):
        return (squared(params, b), b[0].mean())

    np.testing.assert_allclose(retain_losses(with_aux, params, batches, has_aux=True), expected, rtol=1e-6)


def test_retain_losses_do_not_evaluate_the_forget_objective():
    params, batches = mlp(), tuple(batch(4, seed) for seed in range(3))
    for losses in (squared, [ascent, squared, squared]):
        forwards = count_primitive("tanh", lambda p, losses=losses: retain_losses(losses, p, batches), params)
        assert 1 <= forwards <= 2  # One if the two are vmapped.


def test_a_loss_of_exactly_0_is_not_positive_in_log_scale():
    value_and_grad = scalarized_value_and_grad([lambda p, b: 0 * p, lambda p, b: p**2], loss_scale="log")
    losses, grads = value_and_grad(jnp.array(2.0), ({"x": jnp.ones(1)}, {"x": jnp.ones(1)}), jnp.ones(1))
    assert losses[0] == 0
    assert jnp.isnan(grads)


def test_the_weight_of_a_vanishing_loss_is_capped_in_log_scale():
    value_and_grad = scalarized_value_and_grad([lambda p, b: 1e-9 * p, lambda p, b: p], loss_scale="log")
    _, grads = value_and_grad(jnp.array(1.0), ({"x": jnp.ones(1)}, {"x": jnp.ones(1)}), jnp.zeros(1))
    np.testing.assert_allclose(grads, 1e-9 / (1e-9 + 1e-8), rtol=1e-4)


@pytest.mark.parametrize("make", [stacked_value_and_grad, scalarized_value_and_grad])
@pytest.mark.parametrize("loss", [3, None, [squared, 2.0]])
def test_a_loss_that_is_not_a_function_is_refused_before_a_step(make, loss):
    with pytest.raises(ValueError, match=r"^loss: got .*, expected a function, a sequence of functions or a "):
        make(loss)
