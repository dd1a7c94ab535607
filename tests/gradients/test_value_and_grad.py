from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr

from eupmu_jax import (
    implicit_step,
    implicit_surgery,
    retain_losses,
    scalarized_value_and_grad,
    shared_forward,
    stack_objectives,
    stacked_value_and_grad,
)

# "auto" is one of these, see `test_auto_unrolls_on_cpu_and_vmaps_elsewhere`.
MODES = ("vmap", "unroll")


class Pair(NamedTuple):
    x: jax.Array
    y: jax.Array


def mlp(seed=0):
    keys = jax.random.split(jax.random.key(seed), 2)
    return {"in": jax.random.normal(keys[0], (3, 5)), "out": jax.random.normal(keys[1], (5,))}


def forward(params, x):
    return jnp.tanh(x @ params["in"]) @ params["out"]


def squared(params, batch):
    return jnp.mean((forward(params, batch[0]) - batch[1]) ** 2)


def ascent(params, batch):
    return -jnp.mean(jnp.abs(forward(params, batch[0]) - batch[1]))


def batch(size, seed):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(size, 3)), jnp.float32), jnp.asarray(rng.normal(size=size), jnp.float32)


def looped(losses, params, batches, *args):
    """The losses and stacked gradients from one call of jax.grad for each objective."""
    results = [jax.value_and_grad(loss)(params, b, *args) for loss, b in zip(losses, batches, strict=True)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)


def count_primitive(name, function, *args):
    def inner_jaxprs(eqn):
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda v: isinstance(v, Jaxpr | ClosedJaxpr)):
            if isinstance(value, Jaxpr | ClosedJaxpr):
                yield getattr(value, "jaxpr", value)

    def count(jaxpr):
        inner = sum(count(sub) for eqn in jaxpr.eqns for sub in inner_jaxprs(eqn))
        return inner + sum(eqn.primitive.name == name for eqn in jaxpr.eqns)

    return count(jax.make_jaxpr(function)(*args).jaxpr)


shared = shared_forward(
    lambda params, b: forward(params, b[0]),
    [lambda y, b: -jnp.mean(jnp.abs(y - b[1])), lambda y, b: jnp.mean((y - b[1]) ** 2)],
)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sizes", [(4, 4), (4, 36)], ids=str)
@pytest.mark.parametrize(
    ("loss", "losses"),
    [(squared, [squared, squared]), ([ascent, squared], [ascent, squared]), (shared, [ascent, squared])],
    ids=["one loss", "two losses", "shared forward"],
)
def test_equals_a_loop_of_grad(mode, sizes, loss, losses):
    params, batches = mlp(), tuple(batch(size, seed) for seed, size in enumerate(sizes))
    result = jax.jit(stacked_value_and_grad(loss, mode=mode))(params, batches)
    chex.assert_trees_all_close(result, looped(losses, params, batches), rtol=1e-5, atol=1e-6)
    if len(set(sizes)) == 1:
        stacked = jax.jit(stacked_value_and_grad(loss, mode=mode))(params, stack_objectives(*batches))
        chex.assert_trees_all_close(stacked, result, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_four_objectives(mode):
    params, batches = mlp(), tuple(batch(4, seed) for seed in range(4))
    losses, grads = jax.jit(stacked_value_and_grad(squared, mode=mode))(params, stack_objectives(*batches))
    chex.assert_tree_shape_prefix((losses, grads), (4,))
    chex.assert_trees_all_close((losses, grads), looped([squared] * 4, params, batches), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sizes", [(4, 4), (4, 36)], ids=str)
def test_aux_gains_an_objective_axis(mode, sizes):
    def loss(params, b):
        y = forward(params, b[0])
        return jnp.mean((y - b[1]) ** 2), {"mean": jnp.mean(y), "count": jnp.int32(y.size)}

    params, batches = mlp(), tuple(batch(size, seed) for seed, size in enumerate(sizes))
    (losses, aux), grads = jax.jit(stacked_value_and_grad(loss, has_aux=True, mode=mode))(params, batches)
    chex.assert_trees_all_close((losses, grads), looped([squared] * 2, params, batches), rtol=1e-5, atol=1e-6)
    expected = {"mean": [forward(params, b[0]).mean() for b in batches], "count": list(sizes)}
    chex.assert_trees_all_close(
        aux, jax.tree.map(jnp.asarray, expected, is_leaf=lambda x: isinstance(x, list)), rtol=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sizes", [(4, 4), (4, 36)], ids=str)
@pytest.mark.parametrize(
    "pack",
    [
        lambda x, y: {"inputs": {"x": x}, "y": y},
        lambda x, y: ((x,), y),
        lambda x, y: Pair(x, y),
        lambda x, y: [x, {"y": y}],
    ],
    ids=["dict", "tuple", "NamedTuple", "list"],
)
def test_batches_may_have_any_structure(mode, sizes, pack):
    params, batches = mlp(), tuple(batch(size, seed) for seed, size in enumerate(sizes))

    def loss(params, b):
        x, y = jax.tree.leaves(b)
        return squared(params, (x, y))

    result = jax.jit(stacked_value_and_grad(loss, mode=mode))(params, tuple(pack(*b) for b in batches))
    chex.assert_trees_all_close(result, looped([squared] * 2, params, batches), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bare", [True, False])
def test_keys_may_be_leaves_of_batches(mode, bare):
    def loss(params, b):
        return jnp.mean((params + jax.random.normal(b if bare else b["key"], (8,))) ** 2)

    keys = jax.random.split(jax.random.key(0), 2)
    batches = tuple(key if bare else {"key": key} for key in keys)
    value_and_grad, params = jax.jit(stacked_value_and_grad(loss, mode=mode)), jnp.array(1.0)
    expected = looped([loss, loss], params, batches)
    chex.assert_trees_all_close(value_and_grad(params, batches), expected, rtol=1e-5)
    chex.assert_trees_all_close(value_and_grad(params, stack_objectives(*batches)), expected, rtol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_extra_arguments_reach_every_objective_unchanged(mode):
    def loss(params, b, key, scale):
        return jnp.mean((forward(params, b[0]) + scale["value"] * jax.random.normal(key) - b[1]) ** 2)

    params, batches = mlp(), (batch(4, 0), batch(4, 1))
    args = jax.random.key(3), {"value": jnp.array(2.0)}
    result = jax.jit(stacked_value_and_grad(loss, mode=mode))(params, batches, *args)
    chex.assert_trees_all_close(result, looped([loss, loss], params, batches, *args), rtol=1e-5, atol=1e-6)


def test_a_stacked_batch_may_be_a_tuple():
    params, batches = mlp(), (batch(4, 0), batch(4, 1))
    stacked = stack_objectives(*batches)
    assert type(stacked) is tuple
    result = stacked_value_and_grad(squared)(params, stacked)
    chex.assert_trees_all_close(result, looped([squared] * 2, params, batches), rtol=1e-5, atol=1e-6)


def test_bare_arrays_of_two_sizes_are_two_batches():
    def loss(params, x):
        return jnp.mean(params * x)

    losses, grads = stacked_value_and_grad(loss)(jnp.array(2.0), (jnp.ones(4), jnp.full(36, 3.0)))
    np.testing.assert_allclose(losses, [2.0, 6.0])
    np.testing.assert_allclose(grads, [1.0, 3.0])


def test_an_ambiguous_tuple_is_refused():
    with pytest.raises(ValueError, match="may be one stacked batch of 2 objectives or 2 batches"):
        stacked_value_and_grad(lambda params, x: jnp.mean(params * x))(1.0, (jnp.ones((2, 4)), jnp.ones((2, 4))))


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (({"x": jnp.ones(4)},), "got K = 1"),
        ({"x": jnp.ones((1, 4))}, "got K = 1"),
        (({"x": jnp.ones(4)}, {"y": jnp.ones(4)}), "batch 1 has structure"),
        ({"x": jnp.ones((2, 4)), "y": jnp.ones((3, 4))}, "same leading objective axis"),
        ({"x": jnp.ones((2, 4)), "y": 1.0}, "same leading objective axis"),
        ({}, "leaves of shapes none"),
    ],
)
def test_wrong_batches_are_refused(batches, message):
    with pytest.raises(ValueError, match=f"^batches: .*{message}"):
        stacked_value_and_grad(lambda params, b: params)(1.0, batches)


@pytest.mark.parametrize("loss", [[squared] * 3, shared_forward(forward, [squared] * 3)])
def test_there_must_be_as_many_losses_as_batches(loss):
    with pytest.raises(ValueError, match=r"^loss: got 3 functions for 2 batches"):
        stacked_value_and_grad(loss)(mlp(), (batch(4, 0), batch(4, 1)))


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match=r"^mode: got 'fast'"):
        stacked_value_and_grad(squared, mode="fast")


def test_stacking_refuses_different_sizes_and_points_to_the_tuple():
    with pytest.raises(ValueError, match="as a tuple"):
        stack_objectives(batch(4, 0), batch(36, 0))
    with pytest.raises(ValueError, match="got K = 1"):
        stack_objectives(batch(4, 0))


def test_a_shared_forward_runs_the_model_once():
    params, batches = mlp(), stack_objectives(batch(4, 0), batch(4, 1))

    def count(loss):
        return count_primitive("dot_general", stacked_value_and_grad(loss, mode="vmap"), params, batches)

    assert count(shared) == count(squared)
    assert count([ascent, squared]) == 2 * count(squared)


@pytest.mark.parametrize(("backend", "preferred"), [("cpu", "unroll"), ("tpu", "vmap")])
def test_auto_unrolls_on_cpu_and_vmaps_elsewhere(backend, preferred, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)

    def convolve(params, x):
        return jnp.mean(jax.lax.conv_general_dilated(x, params, (1, 1), "SAME") ** 2)

    for primitive, loss, params, batches in (
        ("conv_general_dilated", convolve, jnp.ones((5, 3, 3, 3)), jnp.ones((2, 4, 3, 6, 6))),
        ("dot_general", squared, mlp(), stack_objectives(batch(4, 0), batch(4, 1))),
    ):
        made = {mode: stacked_value_and_grad(loss, mode=mode) for mode in (*MODES, "auto")}
        count = {mode: count_primitive(primitive, function, params, batches) for mode, function in made.items()}
        assert count["unroll"] == 2 * count["vmap"]
        assert count["auto"] == count[preferred]


# Mutable model state, as of BatchNorm.


def batch_norm_model():
    """A loss that mutates the statistics it is given. Call it within jit, or it changes the caller's."""

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.BatchNorm(3, momentum=0.5, rngs=rngs)
            self.out = nnx.Linear(3, 1, rngs=rngs)

        def __call__(self, x):
            return self.out(self.norm(x))[:, 0]

    graph, params, statistics = nnx.split(Model(nnx.Rngs(0)), nnx.Param, ...)

    def loss(params, b, statistics):
        model = nnx.merge(graph, params, statistics)
        value = jnp.mean((model(b[0]) - b[1]) ** 2)
        return value, nnx.state(model, nnx.BatchStat)

    return loss, params, statistics


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sizes", [(4, 4), (4, 36)], ids=str)
def test_the_retain_row_of_batch_norm_statistics_is_that_of_the_retain_batch(mode, sizes):
    loss, params, statistics = batch_norm_model()
    batches = tuple(batch(size, seed) for seed, size in enumerate(sizes))
    value_and_grad = jax.jit(stacked_value_and_grad(loss, has_aux=True, mode=mode))
    (_, aux), _ = value_and_grad(params, batches, statistics)
    chex.assert_tree_shape_prefix(aux, (2,))
    for k in range(2):
        row = jax.tree.map(lambda leaf, k=k: leaf[k], aux)
        chex.assert_trees_all_close(row, jax.jit(loss)(params, batches[k], statistics)[1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(aux["norm"]["mean"][1], 0.5 * batches[1][0].mean(0), rtol=1e-5, atol=1e-6)


def test_the_proxy_of_an_implicit_step_leaves_batch_norm_statistics_alone():
    loss, params, statistics = batch_norm_model()
    batches = (batch(4, 0), batch(36, 1))
    surgery = implicit_surgery(0.0, optax.sgd(1.0), learning_rate=1.0)
    step = jax.jit(implicit_step(loss, surgery, has_aux=True))
    moved, state, (losses, aux) = step(params, surgery.init(params), batches, statistics)
    assert state.count == 1
    np.testing.assert_allclose(losses, [jax.jit(loss)(params, b, statistics)[0] for b in batches], rtol=1e-5)
    for k in range(2):  # The statistics are those of one forward pass at the parameters before the step.
        row = jax.tree.map(lambda leaf, k=k: leaf[k], aux)
        chex.assert_trees_all_close(row, jax.jit(loss)(params, batches[k], statistics)[1], rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_equal_shapes_and_dtypes(moved, params)


@pytest.mark.parametrize("mode", ["vmap", "unroll"])
@pytest.mark.parametrize(
    ("returned", "has_aux", "message"),
    [
        (lambda value: (value, 1.0), False, r"^loss: returned a tuple of 2, expected a scalar; pass has_aux=True"),
        (lambda value: value * jnp.ones(3), False, r"^loss: returned shape \(3,\), expected a scalar; take the mean"),
        (lambda value: {"loss": value}, False, r"^loss: returned a dict, expected a scalar"),
        (lambda value: value, True, r"^loss: returned a scalar, expected \(loss, aux\)"),
        (lambda value: (value, 1.0, 2.0), True, r"^loss: returned a tuple of 3, expected \(loss, aux\)"),
        (lambda value: (value * jnp.ones(3), 1.0), True, r"^loss: returned shape \(3,\), expected a scalar"),
    ],
)
def test_a_loss_that_returns_anything_but_a_scalar_is_named(returned, has_aux, message, mode):
    # BUG: a tuple gave "'tuple' object has no attribute 'dtype'", and three losses were taken for objectives.
    loss = lambda params, x: returned(jnp.mean((x - params) ** 2))
    batches = stack_objectives(jnp.ones((4, 3)), jnp.zeros((4, 3)))
    options = {"has_aux": has_aux, "mode": mode}
    with pytest.raises(ValueError, match=message):
        stacked_value_and_grad(loss, **options)(jnp.zeros(3), batches)
    with pytest.raises(ValueError, match=message):
        scalarized_value_and_grad(loss, **options)(jnp.zeros(3), batches, jnp.ones(1))
    with pytest.raises(ValueError, match=message):
        retain_losses(loss, jnp.zeros(3), batches, has_aux=has_aux)


def test_bare_batches_of_two_dtypes_and_sizes_are_batches():
    # BUG: they were refused, with the advice to pass a tuple, which they were.
    loss = lambda params, x: jnp.mean((x - params) ** 2)
    batches = jnp.ones((4, 3), jnp.bfloat16), np.zeros((9, 3), np.float32)
    losses, grads = stacked_value_and_grad(loss)(jnp.zeros(3), batches)
    np.testing.assert_allclose(losses, [1, 0])
    assert grads.shape == (2, 3)


def test_complex_parameters_are_refused():
    # BUG: the Gram matrix was wrong for complex vectors, and the run diverged.
    loss = lambda params, x: jnp.mean(jnp.abs(x - params["w"]) ** 2)
    params, batches = {"w": jnp.zeros(3, jnp.complex64)}, (jnp.ones((4, 3)), jnp.zeros((9, 3)))
    with pytest.raises(ValueError, match=r"^params: leaf \['w'\] is complex"):
        stacked_value_and_grad(loss)(params, batches)
    with pytest.raises(ValueError, match=r"^params: leaf \['w'\] is complex"):
        scalarized_value_and_grad(loss)(params, batches, jnp.ones(1))


def test_batches_that_differ_only_in_precision_may_be_one_stacked_batch():
    batches = jnp.ones((3, 4), jnp.bfloat16), jnp.zeros((3, 4))
    with pytest.raises(ValueError, match=r"^batches: 2 arrays of shape \(3, 4\) may be one stacked batch"):
        stacked_value_and_grad(lambda w, batch: jnp.mean((w - batch) ** 2))(jnp.ones(()), batches)
