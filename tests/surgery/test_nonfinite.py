import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from eupmu_jax import accumulate, aggregators, implicit_surgery, scale_by_gen, skip_nonfinite, unilateral_surgery
from eupmu_jax.controllers import forget_level

PARAMS = {"w": jnp.array([0.3, -0.7, 1.1]), "b": jnp.array(0.1)}
GRADS = {"w": jnp.array([[1.0, 2.0, 3.0], [-1.0, 0.5, 0.2]]), "b": jnp.array([1.0, -1.0])}
LOSSES = jnp.array([1.0, 2.0])


def without_count(state):
    """The state without the counts of refused steps."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: None if getattr(path[-1], "name", "") == "nonfinite_count" else leaf, state
    )


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("where", ["forget", "retain", "losses"])
def test_parameters_and_moments_stay_bit_for_bit_as_they_were(bad, where):
    tx = skip_nonfinite(optax.chain(unilateral_surgery(), optax.adamw(0.1, weight_decay=0.1)))

    @jax.jit
    def step(params, state, grads, losses):
        updates, state = tx.update(grads, state, params, losses=losses)
        return optax.apply_updates(params, updates), state

    params, state = step(PARAMS, tx.init(PARAMS), GRADS, LOSSES)
    row = {"forget": 0, "retain": 1, "losses": None}[where]
    grads = GRADS if row is None else {**GRADS, "w": GRADS["w"].at[row, 2].set(bad)}
    losses = LOSSES.at[1].set(bad) if row is None else LOSSES
    same, refused = step(params, state, grads, losses)
    chex.assert_trees_all_equal(same, params)
    chex.assert_trees_all_equal(without_count(refused), without_count(state))
    assert optax.tree_utils.tree_get(refused, "nonfinite_count") == 1

    # The run continues as if there had been no such step.
    chex.assert_trees_all_equal(step(same, refused, GRADS, LOSSES)[0], step(params, state, GRADS, LOSSES)[0])


def test_without_the_wrapper_weight_decay_continues():
    tx = optax.chain(unilateral_surgery(), optax.adamw(0.1, weight_decay=0.1))
    updates, _ = tx.update(jax.tree.map(lambda g: g * jnp.nan, GRADS), tx.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["w"], -0.1 * 0.1 * PARAMS["w"], rtol=1e-6)


def test_an_implicit_chain_keeps_its_optimizer_in_step_with_its_surgery():
    tx = skip_nonfinite(optax.chain(optax.adam(0.1), implicit_surgery(0.0, optax.sgd(1.0))))
    grads = jax.tree.map(lambda g: g[0], GRADS)
    update = jax.jit(
        lambda state, losses: tx.update(grads, state, PARAMS, losses=losses, value_fn=lambda p: LOSSES[1:])
    )
    _, state = update(tx.init(PARAMS), LOSSES)
    updates, refused = update(state, LOSSES * jnp.nan)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, PARAMS))
    chex.assert_trees_all_equal(without_count(refused), without_count(state))


def test_a_refusal_by_one_surgery_restores_the_other():
    # BUG: a surgery that did not refuse kept its new state, though its step was undone.
    tx = skip_nonfinite(optax.chain(unilateral_surgery(), optax.sgd(0.1), implicit_surgery(1.0, optax.sgd(1.0))))

    def update(grads, state):
        return tx.update(grads, state, PARAMS, losses=LOSSES, value_fn=lambda p: LOSSES[1:])

    _, state = update(GRADS, tx.init(PARAMS))
    _, refused = update(jax.tree.map(lambda g: g * jnp.nan, GRADS), state)
    chex.assert_trees_all_equal(without_count(refused), without_count(state))


def test_an_accumulated_sum_that_is_refused_is_dropped():
    # BUG: the refused sum was kept, so every later step was refused too.
    inner = optax.chain(unilateral_surgery(), optax.adam(0.1))
    tx = skip_nonfinite(accumulate(inner, 2))
    start, beyond = tx.init(PARAMS), jax.tree.map(lambda g: 1e20 * g, GRADS)
    _, half = tx.update(beyond, start, PARAMS)
    updates, refused = tx.update(GRADS, half, PARAMS)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, PARAMS))
    chex.assert_trees_all_equal(without_count(refused), without_count(start))
    assert optax.tree_utils.tree_get(refused, "nonfinite_count") == 1

    again, fresh = refused, start
    for _ in range(2):
        (updates, again), (wanted, fresh) = (tx.update(GRADS, state, PARAMS) for state in (again, fresh))
    assert np.any(updates["w"] != 0)
    chex.assert_trees_all_equal(updates, wanted)


def test_an_accumulated_sum_is_kept_where_another_surgery_refuses():
    accumulated = accumulate(optax.chain(unilateral_surgery(), optax.sgd(0.1)), 2)
    tx = skip_nonfinite(optax.chain(forget_level(0.5), accumulated))
    bad, good = jnp.array([jnp.nan, 0.1]), jnp.array([0.2, 0.1])
    _, half = tx.update(GRADS, tx.init(PARAMS), PARAMS, errors=good)
    updates, refused = tx.update(GRADS, half, PARAMS, errors=bad)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, PARAMS))
    chex.assert_trees_all_equal(without_count(refused), without_count(half))


def test_a_chain_without_surgery_is_refused():
    with pytest.raises(ValueError, match=r"^inner: .*holds no surgery"):
        skip_nonfinite(optax.adam(0.1)).init(PARAMS)


def test_another_number_of_objectives_is_named():
    # BUG: it gave a raw error about shapes that cannot be broadcast.
    tx = skip_nonfinite(optax.chain(unilateral_surgery(), optax.sgd(0.1)))
    grads = jax.tree.map(lambda g: jnp.concatenate([g, g[:1]]), GRADS)
    with pytest.raises(ValueError, match=r"changes shape in an update; pass num_objectives=3 to its surgery"):
        tx.update(grads, tx.init(PARAMS), PARAMS)


def test_a_direction_that_overflows_in_float16_is_refused():
    # BUG: the sums are finite in float32 but the direction is infinite in float16, and the step was taken.
    tx = skip_nonfinite(optax.chain(unilateral_surgery(retain_weight=1.0), optax.sgd(1e-3)))
    params = jnp.zeros(2, jnp.float16)
    updates, state = tx.update(jnp.array([[4e4, 1.0], [4e4, 0.0]], jnp.float16), tx.init(params), params)
    chex.assert_trees_all_equal(updates, params)
    assert optax.tree_utils.tree_get(state, "nonfinite_count") == 1


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_an_aggregator_with_a_setting_that_is_not_finite_takes_no_step(bad):
    # BUG: only the Gram matrix was checked, not the weights.
    tx = skip_nonfinite(optax.chain(optax.inject_hyperparams(aggregators.cagrad)(c=0.4), optax.sgd(0.1)))
    state = tx.init(PARAMS)
    state[0].hyperparams["c"] = jnp.asarray(bad)
    updates, state = jax.jit(tx.update)(GRADS, state, PARAMS)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, PARAMS))
    assert optax.tree_utils.tree_get(state, "nonfinite_count") == 1


def test_a_hyperparameter_set_by_hand_is_accepted_whatever_the_dtype():
    # BUG: a Python number in the state has no dtype, which caused an AttributeError with parameters in bfloat16.
    tx = skip_nonfinite(optax.chain(unilateral_surgery(), optax.inject_hyperparams(optax.sgd)(0.1)))
    params = jnp.zeros(2, jnp.bfloat16)
    state = tx.init(params)
    state[1].hyperparams["learning_rate"] = 0.5
    updates, _ = tx.update(jnp.array([[1.0, 0.0], [0.0, 1.0]], jnp.bfloat16), state, params)
    assert updates.tolist() == [-0.5, 0.0]


def test_scalar_gradients_that_are_not_stacked_are_accepted():
    # BUG: the number of objectives was read from their shape, though only an error message needs it.
    tx = skip_nonfinite(optax.chain(optax.sgd(1.0), scale_by_gen(0.5)))
    updates, _ = tx.update(jnp.array(1.0), tx.init(jnp.array(1.0)), jnp.array(1.0), value_fn=lambda w: w**2)
    assert updates < 0
