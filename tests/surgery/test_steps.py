import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

from eupmu_jax import explicit_step, implicit_step, implicit_surgery, multipliers, unilateral_surgery

PARAMS = {"w": jnp.array([0.5, -1.0, 2.0])}
BATCHES = jax.random.normal(jax.random.key(0), (5, 3)), jax.random.normal(jax.random.key(1), (9, 3))


def loss(params, x, scale=1.0):
    return scale * jnp.mean((x @ params["w"] - 1) ** 2)


def explicit():
    tx = optax.chain(unilateral_surgery(), optax.sgd(0.1))
    return explicit_step(loss, tx), tx


def implicit(proxy="same_batch"):
    tx = optax.chain(optax.sgd(0.1), implicit_surgery(0.0, optax.sgd(1.0), proxy=proxy, learning_rate=0.1))
    return implicit_step(loss, tx), tx


KINDS = pytest.mark.parametrize("make", [explicit, implicit, lambda: implicit("next_batch")])


@KINDS
def test_donated_and_scanned_steps_agree(make):
    step, tx = make()
    donating = jax.jit(step, donate_argnums=(0, 1))
    params, state = jax.tree.map(jnp.copy, PARAMS), tx.init(PARAMS)
    seen = []
    for _ in range(4):
        given = params
        params, state, losses = donating(params, state, BATCHES)
        assert given["w"].is_deleted()
        seen.append(losses)

    def body(carry, _):
        params, state, losses = step(*carry, BATCHES)
        return (params, state), losses

    (scanned, _), losses = jax.jit(lambda carry: jax.lax.scan(body, carry, length=4))((PARAMS, tx.init(PARAMS)))
    chex.assert_trees_all_close((scanned, losses), (params, jnp.stack(seen)), rtol=1e-5)
    np.testing.assert_allclose(losses[0], [loss(PARAMS, x) for x in BATCHES], rtol=1e-5)
    assert jnp.any(scanned["w"] != PARAMS["w"])


@KINDS
def test_extra_arguments_reach_the_loss(make):
    step, tx = make()
    _, _, losses = jax.jit(step)(PARAMS, tx.init(PARAMS), BATCHES, 3.0)
    np.testing.assert_allclose(losses, [loss(PARAMS, x, 3.0) for x in BATCHES], rtol=1e-5)


def test_the_implicit_proxy_reuses_the_noise_of_the_step():
    """With parameters frozen, a new key in the second forward pass would show as a change of the retain loss."""

    def noisy(params, x, key):
        return jnp.mean((x @ params["w"] + jax.random.normal(key)) ** 2)

    tx = optax.chain(optax.sgd(0.0), implicit_surgery(0.0, optax.sgd(1.0), initial_multiplier=2.0))
    _, state, _ = implicit_step(noisy, tx)(PARAMS, tx.init(PARAMS), BATCHES, jax.random.key(5))
    np.testing.assert_array_equal(multipliers(state), [2.0])


@pytest.mark.parametrize(("proxy", "forwards"), [("same_batch", 3), ("next_batch", 2)])
def test_next_batch_makes_no_second_forward_pass(proxy, forwards):
    def counted(params, x):
        return jnp.mean(jnp.arctan(x @ params["w"]) ** 2)

    tx = optax.chain(optax.sgd(0.1), implicit_surgery(0.0, optax.sgd(1.0), proxy=proxy))
    jaxpr = jax.make_jaxpr(implicit_step(counted, tx))(PARAMS, tx.init(PARAMS), BATCHES)
    assert sum(equation.primitive.name == "atan" for equation in jaxpr.eqns) == forwards


def test_explicit_step_returns_aux():
    def with_aux(params, x):
        return (loss(params, x), x.mean())

    tx = unilateral_surgery()
    _, _, (losses, aux) = explicit_step(with_aux, tx, has_aux=True)(PARAMS, tx.init(PARAMS), BATCHES)
    np.testing.assert_allclose(losses, [loss(PARAMS, x) for x in BATCHES], rtol=1e-5)
    np.testing.assert_allclose(aux, [x.mean() for x in BATCHES], rtol=1e-5)


def test_any_optimizer_without_extra_arguments_will_do():
    mean_of_rows = optax.stateless(lambda updates, params: jax.tree.map(lambda u: u.mean(0), updates))
    plain = optax.GradientTransformation(mean_of_rows.init, lambda u, s, p=None: mean_of_rows.update(u, s, p))
    params, _, _ = explicit_step(loss, plain)(PARAMS, plain.init(PARAMS), BATCHES)
    gradient = jax.grad(lambda p: sum(loss(p, x) for x in BATCHES) / 2)(PARAMS)
    chex.assert_trees_all_close(params, optax.apply_updates(PARAMS, gradient), rtol=1e-5)


def test_train_state_works_with_explicit_surgery_and_names_what_implicit_surgery_lacks():
    _, tx = explicit()
    grads = {"w": jnp.array([[-1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])}
    train_state = TrainState.create(apply_fn=None, params=PARAMS, tx=tx).apply_gradients(grads=grads)
    np.testing.assert_allclose(train_state.params["w"], PARAMS["w"] - 0.1 * jnp.array([0.0, 1.0, 0.0]), rtol=1e-6)

    _, tx = implicit()
    with pytest.raises(ValueError, match=r"^losses: got None"):
        TrainState.create(apply_fn=None, params=PARAMS, tx=tx).apply_gradients(grads=PARAMS)
