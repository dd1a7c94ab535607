import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from eupmu_jax import accumulate, explicit_step, stacked_value_and_grad, tolerances, unilateral_surgery

PARAMS = {"w": jnp.array([0.5, -1.0, 2.0])}


def loss(params, x):
    return jnp.mean((x @ params["w"]) ** 2) + jnp.mean(x)


def microbatches(n, k=2, size=4):
    return jax.random.normal(jax.random.key(0), (n, k, size, 3))


def train(tx, batches):
    step = jax.jit(explicit_step(loss, tx))
    params, state, seen = PARAMS, tx.init(PARAMS), []
    for batch in batches:
        params, state, _ = step(params, state, batch)
        seen.append(params)
    return seen, state


def test_microbatches_equal_one_batch():
    batches = microbatches(6)
    chain = optax.chain(unilateral_surgery(tolerances.budget(2.0, 1.0)), optax.adam(0.1))
    seen, state = train(accumulate(chain, 3), batches)
    whole, whole_state = train(chain, [jnp.concatenate(batches[i : i + 3], axis=1) for i in (0, 3)])
    chex.assert_trees_all_equal(seen[:2], [PARAMS] * 2)
    chex.assert_trees_all_close(seen[2::3], whole, rtol=1e-5)
    chex.assert_trees_all_close(state.inner_state, whole_state, rtol=1e-4, atol=1e-6)
    assert state.mini_step == 0


def test_bfloat16_gradients_are_summed_in_float32():
    params = jnp.ones(1, jnp.bfloat16)
    tx = accumulate(optax.chain(unilateral_surgery(), optax.sgd(1.0)), 512)
    state, grads = tx.init(params), jnp.ones((2, 1), jnp.bfloat16)
    state, updates = jax.lax.scan(lambda state, _: tx.update(grads, state, params)[::-1], state, length=512)
    assert updates.dtype == jnp.bfloat16
    np.testing.assert_array_equal(updates[-1], -1.0)  # A sum in bfloat16 would stop at 256.


def test_a_refused_microbatch_is_replaced_by_the_next():
    batches = microbatches(2)
    tx = accumulate(optax.chain(unilateral_surgery(), optax.adam(0.1)), 2)
    expected, _ = train(tx, batches)
    seen, state = train(tx, [batches[0], batches[0] * jnp.nan, batches[1]])
    chex.assert_trees_all_equal(seen, [PARAMS, PARAMS, expected[-1]])
    assert state.refused_microbatches == 1


def test_extra_arguments_of_the_last_microbatch_reach_the_chain():
    def update_fn(updates, state, params=None, *, scale, **extra_args):
        return jax.tree.map(lambda u: scale * u, updates), state

    scaled = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update_fn)
    tx = accumulate(optax.chain(unilateral_surgery(), scaled), 2)
    grads, state = {"w": jnp.ones((2, 3))}, tx.init(PARAMS)
    _, state = tx.update(grads, state, PARAMS, scale=2.0)
    updates, _ = tx.update(grads, state, PARAMS, scale=3.0)
    np.testing.assert_allclose(updates["w"], 3.0)


def test_three_objectives_can_be_accumulated():
    tx = accumulate(unilateral_surgery(num_objectives=3), 2, num_objectives=3)
    grads = {"w": jnp.array([[-1.0, -1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])}
    update = jax.jit(tx.update)
    _, state = update(grads, tx.init(PARAMS), PARAMS)
    updates, _ = update(grads, state, PARAMS)
    np.testing.assert_allclose(updates["w"], [0.0, 0.0, 1.0], atol=1e-6)


def test_multi_steps_around_surgery_fails_loudly():
    """The reason for `accumulate`. This test fails if Optax ever makes the combination work."""
    tx = optax.MultiSteps(optax.chain(unilateral_surgery(), optax.adam(0.1)), 2)
    _, grads = stacked_value_and_grad(loss)(PARAMS, microbatches(1)[0])
    with pytest.raises((TypeError, ValueError)):
        tx.update(grads, tx.init(PARAMS), PARAMS)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match=r"^every_k_steps: got 0"):
        accumulate(unilateral_surgery(), 0)
    tx = accumulate(unilateral_surgery(), 2)
    with pytest.raises(ValueError, match=r"^updates: got 3 objectives, expected 2, as set by num_objectives"):
        tx.update({"w": jnp.ones((3, 3))}, tx.init(PARAMS), PARAMS)


def test_a_chain_of_another_number_of_objectives_is_refused_by_name():
    # BUG: it failed in lax.cond with a TypeError about branch types; the chain itself needs num_objectives too.
    tx = accumulate(unilateral_surgery(), 1, num_objectives=3)
    with pytest.raises(ValueError, match="num_objectives"):
        tx.update({"w": jnp.ones((3, 3))}, tx.init(PARAMS), PARAMS)


def test_moments_wider_than_the_parameters_are_kept():
    # BUG: they failed in lax.cond with a TypeError about the dtypes of its branches.
    tx = accumulate(optax.chain(unilateral_surgery(), optax.adam(0.1, mu_dtype=jnp.float32)), 2)
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    grads, state = {"w": jnp.ones((2, 3), jnp.bfloat16)}, tx.init(params)
    for _ in range(2):
        updates, state = tx.update(grads, state, params)
    assert updates["w"].dtype == jnp.bfloat16
    np.testing.assert_allclose(updates["w"].astype(jnp.float32), -0.1, rtol=0.01)


def test_errors_are_averaged_like_losses():
    # BUG: only the errors of the last microbatch reached the chain.
    def update_fn(updates, state, params=None, *, losses, errors, **extra_args):
        return jax.tree.map(lambda leaf: leaf[0], updates), jnp.concatenate([losses, errors])

    inner = optax.GradientTransformationExtraArgs(lambda params: jnp.zeros(4), update_fn)
    tx, params = accumulate(inner, 2), jnp.zeros(1)
    state, grads = tx.init(params), jnp.ones((2, 1))
    refused = ([jnp.nan, 0.0], [1.0, 1.0]), ([1.0, 1.0], [jnp.nan, 1.0])
    for losses, errors in (([1.0, 2.0], [0.0, 0.5]), *refused, ([3.0, 2.0], [0.5, 0.0])):
        _, state = tx.update(grads, state, params, losses=jnp.array(losses), errors=jnp.array(errors))
    assert state.inner_state.tolist() == [2.0, 2.0, 0.25, 0.25]
    assert state.refused_microbatches == 2
    assert state.error_sum.tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match=r"errors: got shape \(3,\), expected \(2,\)"):
        tx.update(grads, state, params, errors=jnp.zeros(3))


def test_a_number_of_microbatches_that_falls_leaves_the_mean_a_mean():
    # BUG: the sum of four microbatches was divided by two.
    make = optax.inject_hyperparams(lambda n: accumulate(optax.chain(unilateral_surgery(), optax.sgd(1.0)), n))
    tx, params = make(n=lambda count: jnp.where(count < 3, 4, 2)), jnp.zeros(1)
    state, updates = tx.init(params), []
    for _ in range(6):
        update, state = tx.update(jnp.array([[1.0], [0.0]]), state, params)
        updates.append(float(update[0]))
    assert updates == [0, 0, 0, -1, 0, -1]


def test_float64_gradients_are_summed_in_float64():
    with jax.enable_x64():
        tx, params = accumulate(unilateral_surgery(), 2), jnp.zeros(1)
        state = tx.init(params)
        for value in (1.0, 1.0 + 2e-12):
            updates, state = tx.update(jnp.array([[value], [0.0]]), state, params)
        np.testing.assert_allclose(updates - 1, 1e-12, rtol=1e-3)
