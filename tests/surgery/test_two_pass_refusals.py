"""What `two_pass` refuses: arguments, and steps that are not finite or have no direction."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from eupmu_jax import tolerances
from eupmu_jax.surgery.two_pass import two_pass

from .test_two_pass import adam, loss, make_batches, make_params

pytestmark = pytest.mark.slow


def test_a_parameter_without_a_gradient_is_named():
    # BUG: jax.grad raised a TypeError that named no leaf.
    params = {**make_params(), "count": jnp.arange(2)}
    init, step = two_pass(loss, adam())
    with pytest.raises(ValueError, match=r"^params: leaf \['count'\] is int32"):
        step(params, init(params), make_batches(4, 4))


@pytest.mark.parametrize(
    ("options", "sizes", "message"),
    [
        ({"num_objectives": 3}, (4, 4), r"^batches: got 2 objectives, expected 3"),
        ({"tolerance": jnp.zeros(3)}, (4, 4), r"^batches: got 2 objectives, expected 4"),
        ({}, (4,) * 17, r"^batches: got 17 objectives, expected at most 16"),
        ({"tolerance": -1.0}, (4, 4), r"^tolerance: got -1.0"),
        ({"retain_weight": -1.0}, (4, 4), r"^retain_weight: got -1.0"),
        ({"retain_weight": np.ones(3)}, (4, 4), r"^batches: got 2 objectives, expected 4"),
        ({"mode": "pmap"}, (4, 4), r"^mode: got 'pmap'"),
        ({"tolerance": tolerances.budget(1.0, 1.0)}, (4,), r"^batches: "),
    ],
)
def test_errors_name_the_argument(options, sizes, message):
    def make_and_step():
        init, step = two_pass(loss, adam(), **options)
        return jax.eval_shape(step, make_params(), init(make_params()), make_batches(*sizes))

    with pytest.raises(ValueError, match=message):
        make_and_step()


def test_a_step_that_is_not_finite_changes_nothing_but_its_count():
    params, batches = make_params(), make_batches(24, 24)
    # The tolerance's state holds the start of the run, which a refused step must not change either.
    init, step = two_pass(loss, adam(), tolerances.budget(-0.2, 1.0, relative_to_start=True))
    step = jax.jit(step)
    states = [init(params), step(params, init(params), batches)[1]]
    for objective, value, state in itertools.product([0, 1], [jnp.nan, jnp.inf], states):
        bad = list(batches)
        bad[objective] = bad[objective] | {"x": bad[objective]["x"].at[3, 2].set(value)}
        kept, refused, _ = step(params, state, tuple(bad))
        chex.assert_trees_all_equal(kept, params)
        chex.assert_trees_all_equal(refused.inner_state, state.inner_state)
        expected = state.surgery_state._replace(nonfinite_count=state.surgery_state.nonfinite_count + 1)
        chex.assert_trees_all_equal(refused.surgery_state, expected)


def test_a_refused_step_returns_the_losses_and_the_aux():
    def with_aux(params, batch):
        return loss(params, batch), batch["x"].sum()

    params, batches = make_params(), make_batches(24, 24)
    batches = (batches[0], batches[1] | {"x": batches[1]["x"] * jnp.inf})
    init, step = two_pass(with_aux, adam(), has_aux=True)
    kept, _, (losses, aux) = jax.jit(step)(params, init(params), batches)
    chex.assert_trees_all_equal(kept, params)
    np.testing.assert_allclose(losses[0], loss(params, batches[0]), rtol=1e-5)
    np.testing.assert_allclose(aux[0], batches[0]["x"].sum(), rtol=1e-5)
    assert not jnp.isfinite(losses[1])
    assert not jnp.isfinite(aux[1])


def test_a_forget_gradient_that_is_infinite_orthogonally_to_the_retain_gradient_is_refused():
    """The derivative along the retain gradient is finite; the bent gradient is not."""

    params = {"w": jnp.array(1.0), "v": jnp.array(0.0)}
    init, step = two_pass([lambda p, b: b * (p["w"] + jnp.sqrt(p["v"])), lambda p, b: b * p["w"]], optax.sgd(0.1))
    kept, state, _ = jax.jit(step)(params, init(params), (jnp.array(1.0), jnp.array(1.0)))
    chex.assert_trees_all_equal(kept, params)
    assert int(state.surgery_state.nonfinite_count) == 1


@pytest.mark.parametrize("k", [2, 3])
def test_a_retain_gradient_of_zero_leaves_the_forget_gradient_alone(k):
    params = make_params()
    weighted = lambda params, batch: batch["weight"] * loss(params, batch)
    batches = tuple(batch | {"weight": jnp.float32(i == 0)} for i, batch in enumerate(make_batches(*(24,) * k)))
    init, step = two_pass(weighted, optax.sgd(1.0), num_objectives=k)
    new, state, _ = jax.jit(step)(params, init(params), batches)
    expected = jax.tree.map(lambda p, g: p - g, params, jax.grad(loss)(params, batches[0]))
    chex.assert_trees_all_close(new, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(state.surgery_state.multipliers, 0)
    squared = optax.tree_utils.tree_norm(jax.grad(loss)(params, batches[0]), squared=True)
    np.testing.assert_allclose(state.surgery_state.gram[0, 0], squared, rtol=1e-5)


def test_opposite_gradients_leave_no_direction():
    init, step = two_pass([lambda p, b: -loss(p, b), loss], optax.sgd(1.0))
    params, (batch,) = make_params(), make_batches(24)
    new, state, _ = jax.jit(step)(params, init(params), (batch, batch))
    chex.assert_trees_all_close(new, params, atol=1e-6)
    np.testing.assert_allclose(state.surgery_state.multipliers, [1.0], rtol=1e-5)
    np.testing.assert_allclose(state.surgery_state.gram[0, 0], state.surgery_state.gram[1, 1], rtol=1e-5)
