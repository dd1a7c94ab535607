"""What multipliers of implicit surgery are updated with: changes on the next batch, levels, and logarithms."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from eupmu_jax import (
    implicit_step,
    implicit_surgery,
    multipliers,
    scalarized_value_and_grad,
    tolerances,
)

from .test_implicit import P, moved, retain


def test_next_batch_by_hand():
    rates = jnp.array([0.5, 1.0, 0.25, 1.0])
    surgery = implicit_surgery(
        0.25, optax.sgd(2.0), proxy="next_batch", learning_rate=lambda count: rates[count], initial_multiplier=1.0
    )
    state, seen = surgery.init(P), []
    for loss in (3.0, 4.0, 4.5, 2.0):
        _, state = surgery.update(jnp.zeros(2), state, losses=jnp.array([1.0, loss]))
        seen.append(float(state.multipliers[0]))
    # 1: nothing to compare with. 2: -2(-1/0.5 + 1/4). 3: -2(-0.5/1 + 1/4). 4: -2(2.5/0.25 + 1/4), projected to 0.
    np.testing.assert_allclose(seen, [1.0, 4.5, 5.0, 0.0])
    assert state.count == 4


def test_the_first_step_of_next_batch_leaves_the_controller_alone():
    surgery = implicit_surgery(0.25, optax.adam(1.0), proxy="next_batch", initial_multiplier=5.0)
    state = surgery.init(P)
    _, first = surgery.update(jnp.zeros(2), state, losses=jnp.array([1.0, 3.0]))
    chex.assert_trees_all_equal(first.controller_state, state.controller_state)
    _, second = surgery.update(jnp.zeros(2), first, losses=jnp.array([1.0, 3.0]))
    np.testing.assert_allclose(second.multipliers, [4.0], rtol=1e-5)


def test_next_batch_takes_the_tolerance_of_the_step_it_measures():
    # BUG: the loss change and the rate were those of step count - 1, but the tolerance was that of step count.
    epsilons = jnp.array([0.5, 0.0])
    surgery = implicit_surgery(
        lambda count: epsilons[count], optax.sgd(1.0), proxy="next_batch", initial_multiplier=1.0
    )
    state = surgery.init(P)
    for loss in (1.0, 1.0):
        _, state = surgery.update(jnp.zeros(2), state, losses=jnp.array([1.0, loss]))
    np.testing.assert_allclose(state.multipliers, [0.5])


def test_the_level_proxy_needs_no_loss_after_the_step():
    surgery = implicit_surgery(tolerances.budget(1.0, 1.0), optax.sgd(2.0), proxy="level", learning_rate=0.1)
    state, seen = surgery.init(P), []
    for loss in (1.5, 2.0, 1.0, 0.0):
        _, state = surgery.update(jnp.zeros(2), state, losses=jnp.array([1.0, loss]))
        seen.append(float(state.multipliers[0]))
    np.testing.assert_allclose(seen, [1.0, 3.0, 3.0, 1.0])


def test_in_log_scale_the_level_is_the_log_loss_and_measured_levels_are_used_unchanged():
    surgery = implicit_surgery(tolerances.budget(0.5, 1.0), optax.sgd(1.0), loss_scale="log", proxy="level")
    losses = jnp.array([1.0, 3.0])
    _, state = surgery.update(jnp.zeros(2), surgery.init(P), losses=losses)
    np.testing.assert_allclose(state.multipliers, [np.log(3.0) - 0.5], rtol=1e-6)
    _, state = surgery.update(jnp.zeros(2), surgery.init(P), losses=losses, levels=jnp.array([0.75]))
    np.testing.assert_allclose(state.multipliers, [0.25], rtol=1e-6)


def test_a_limit_on_a_level_without_a_gradient_is_kept_while_the_loss_drives_the_model():
    """A linear classifier unlearns a cluster on one side of its boundary, and may misclassify a tenth of the rest."""
    rng = np.random.default_rng(0)
    label = np.repeat([-1.0, 1.0], 20)
    forget_x = jnp.asarray(np.stack([0.6 + 0.4 * rng.normal(size=40), rng.normal(size=40), np.ones(40)], axis=1))
    retain_x = jnp.asarray(np.stack([label + 0.4 * rng.normal(size=40), rng.normal(size=40), np.ones(40)], axis=1))

    def error_rate(w):
        return jnp.mean(label * (retain_x @ w) <= 0)[None]

    loss = [
        lambda w, batch: jnp.mean(jax.nn.softplus(forget_x @ w)),
        lambda w, batch: jnp.mean(jax.nn.softplus(-label * (retain_x @ w))),
    ]
    value_and_grad = scalarized_value_and_grad(loss)

    def final_error_rate(tolerance, controller, measured, initial_multiplier=0.0):
        surgery = implicit_surgery(tolerance, controller, proxy="level", initial_multiplier=initial_multiplier)
        tx = optax.chain(optax.sgd(0.5), surgery)

        def step(carry, _):
            w, state = carry
            losses, gradient = value_and_grad(w, jnp.zeros((2, 1)), multipliers(state))
            levels = error_rate(w) if measured else None
            updates, state = tx.update(gradient, state, w, losses=losses, levels=levels)
            return (optax.apply_updates(w, updates), state), (error_rate(w)[0], losses[0])

        w = jnp.array([3.0, 0.0, 0.0])
        _, (errors, forget) = jax.jit(lambda carry: jax.lax.scan(step, carry, length=800))((w, tx.init(w)))
        assert errors[0] <= 0.1
        assert forget[-1] < 0.5 * forget[0]
        return errors[-100:].max()

    assert final_error_rate(tolerances.budget(0.1, 1.0), optax.sgd(0.1), measured=True) <= 0.1 + 1e-6
    # Neither adding the loss to the sum nor a limit on the loss keeps the error rate.
    assert final_error_rate(0.0, optax.sgd(1.0), measured=False, initial_multiplier=1.0) > 0.15
    assert final_error_rate(tolerances.budget(0.4, 1.0), optax.sgd(0.1), measured=False) > 0.15


def test_log_scale_measures_logarithms():
    surgery = implicit_surgery(0.1, optax.sgd(1.0), loss_scale="log", learning_rate=0.5)
    np.testing.assert_allclose(moved(surgery, 1.0, 3.0).multipliers, [np.log(3.0) / 0.5 - 0.1], rtol=1e-5)
    # The offset of 1e-8 bounds the change of a vanishing loss.
    np.testing.assert_allclose(moved(surgery, 1e-8, 3e-8).multipliers, [np.log(2.0) / 0.5 - 0.1], rtol=1e-5)


def test_losses_that_are_not_positive_are_refused_in_log_scale():
    surgery = implicit_surgery(0.0, optax.sgd(1.0), loss_scale="log")
    state = moved(surgery, 1.0, 1.0)
    with pytest.raises(ValueError, match=r"losses\[1\] = -0.5 at step 1 \(retain\)"):
        moved(surgery, -0.5, 1.0, state)
    with pytest.raises(ValueError, match=r"losses\[0\] = 0 at step 1 \(forget\)"):
        surgery.update(jnp.zeros(2), state, P, losses=jnp.array([0.0, 1.0]), value_fn=retain(1.0))
    refused = jax.jit(lambda state: moved(surgery, -0.5, 1.0, state))(state)
    chex.assert_trees_all_equal(refused, state._replace(nonfinite_count=jnp.int32(1)))


def test_a_forget_loss_that_is_not_positive_in_log_scale_is_refused_inside_jit():
    loss = [lambda w, b: -jnp.mean((w - b) ** 2), lambda w, b: jnp.mean((w - b) ** 2)]
    tx = optax.chain(optax.sgd(0.1), implicit_surgery(0.0, optax.sgd(1.0), loss_scale="log"))
    step = jax.jit(implicit_step(loss, tx, loss_scale="log"))
    params, state, _ = step(P, tx.init(P), (jnp.ones((3, 2)), jnp.zeros((5, 2))))
    np.testing.assert_array_equal(params, P)
    assert optax.tree_utils.tree_get(state, "nonfinite_count") == 1


@pytest.mark.parametrize("proxy", ["same_batch", "next_batch", "level"])
def test_a_loss_without_a_logarithm_is_refused_at_a_learning_rate_of_0_too(proxy):
    surgery = implicit_surgery(0.0, optax.sgd(1.0), loss_scale="log", proxy=proxy, learning_rate=0.0)
    state = surgery.init(P)
    refused = jax.jit(lambda state: moved(surgery, -0.5, 1.0, state))(state)
    chex.assert_trees_all_equal(refused, state._replace(nonfinite_count=jnp.int32(1)))
