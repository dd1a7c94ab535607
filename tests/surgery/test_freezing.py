import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from eupmu_jax import accumulate, freeze, implicit_surgery, multipliers, unilateral_surgery

PARAMS = {"body": jnp.array([0.1, 0.2]), "head": jnp.array([0.3, 0.4, 0.5])}
FROZEN = {"body": True, "head": False}
GRADS = {
    "body": jnp.array([[5.0, 5.0], [5.0, -5.0]]),
    "head": jnp.array([[-1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]),
}


@pytest.mark.parametrize("frozen", [FROZEN, lambda params: {name: name == "body" for name in params}])
def test_frozen_leaves_stay_bit_for_bit_and_do_not_enter_the_gram_matrix(frozen):
    tx = freeze(optax.chain(unilateral_surgery(), optax.adamw(0.1, weight_decay=0.1)), frozen)
    update = jax.jit(tx.update)
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(3):
        updates, state = update(GRADS, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(params["body"], PARAMS["body"])
    assert jnp.all(params["head"] != PARAMS["head"])
    np.testing.assert_allclose(optax.tree_utils.tree_get(state, "gram"), [[2.0, -1.0], [-1.0, 1.0]])
    assert sum(leaf.size for leaf in jax.tree.leaves(optax.tree_utils.tree_get(state, "mu"))) == 3


def test_the_trainable_part_moves_as_if_it_were_alone():
    chain = optax.chain(unilateral_surgery(0.1), optax.adam(0.1))
    tx = freeze(chain, FROZEN)
    updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    alone, _ = chain.update(GRADS["head"], chain.init(PARAMS["head"]), PARAMS["head"])
    chex.assert_trees_all_equal(updates, {"body": jnp.zeros(2), "head": alone})


def test_a_non_finite_frozen_gradient_does_not_matter():
    tx = freeze(unilateral_surgery(), FROZEN)
    updates, _ = tx.update({**GRADS, "body": GRADS["body"] * jnp.nan}, tx.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["head"], [0.0, 1.0, 0.0])
    np.testing.assert_array_equal(updates["body"], 0.0)


def test_value_fn_gets_all_parameters():
    tx = freeze(optax.chain(optax.sgd(1.0), implicit_surgery(0.0, optax.sgd(1.0))), FROZEN)

    def value(params):
        return jnp.sum(params["body"]) + jnp.sum(params["head"])

    grads = {"body": jnp.ones(2), "head": -jnp.ones(3)}
    losses = jnp.stack([jnp.array(1.0), value(PARAMS)])
    _, state = tx.update(grads, tx.init(PARAMS), PARAMS, losses=losses, value_fn=value)
    np.testing.assert_allclose(multipliers(state), [3.0], rtol=1e-6)


def test_accumulation_works_inside_freeze():
    tx = freeze(accumulate(unilateral_surgery(), 2), FROZEN)
    update = jax.jit(tx.update)
    first, state = update(GRADS, tx.init(PARAMS), PARAMS)
    second, _ = update(GRADS, state, PARAMS)
    chex.assert_trees_all_equal(first, jax.tree.map(jnp.zeros_like, PARAMS))
    np.testing.assert_allclose(second["head"], [0.0, 1.0, 0.0])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda surgery: optax.masked(surgery, {"body": False, "head": True}),
        lambda surgery: optax.partition({"on": surgery, "off": optax.set_to_zero()}, {"body": "off", "head": "on"}),
    ],
    ids=["masked", "partition"],
)
def test_optax_wrappers_around_surgery_are_refused(wrap):
    tx = wrap(optax.chain(unilateral_surgery(), optax.adam(0.1)))
    with pytest.raises(ValueError, match=r"^updates: .*eupmu_jax\.freeze"):
        tx.update(GRADS, tx.init(PARAMS), PARAMS)


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"^frozen: got no leaf \['head'\], expected the structure of params"):
        freeze(unilateral_surgery(), {"body": True}).init(PARAMS)
    with pytest.raises(ValueError, match=r"^frozen: every leaf is frozen"):
        freeze(unilateral_surgery(), {"body": True, "head": True}).init(PARAMS)
    tx = freeze(unilateral_surgery(), FROZEN)
    with pytest.raises(ValueError, match=r"^params: got None"):
        tx.update(GRADS, tx.init(PARAMS))


@pytest.mark.parametrize("leaf", ["frozen", jnp.array([True, False]), 1])
def test_a_mask_is_of_bools(leaf):
    tx = freeze(unilateral_surgery(), {"body": leaf, "head": False})
    with pytest.raises(ValueError, match=r"^frozen: leaf \['body'\] is .*, expected True or False"):
        tx.init({"body": jnp.ones(2), "head": jnp.ones(1)})
