"""`functional` and the dtypes of every classifier."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from eupmu_jax.models import MLP, VGG16, ResNet8, ResNet18, ResNet20, SmallCNN, ViT, functional

pytestmark = pytest.mark.slow

MODELS = {
    "mlp": lambda **options: MLP((64, 8, 3), nnx.Rngs(0), **options),
    "cnn": lambda **options: SmallCNN(3, (4, 8), 1, 8, 8, rngs=nnx.Rngs(0), **options),
    "resnet8": lambda **options: ResNet8(3, 1, rngs=nnx.Rngs(0), **options),
    "resnet20": lambda **options: ResNet20(3, 1, rngs=nnx.Rngs(0), **options),
    "resnet18": lambda **options: ResNet18(3, 1, rngs=nnx.Rngs(0), **options),
    "vgg16": lambda **options: VGG16(3, 1, rngs=nnx.Rngs(0), **options),
    "vit": lambda **options: ViT(3, 1, 8, width=12, layers=1, rngs=nnx.Rngs(0), **options),
}
NORMALISED = ("resnet8", "resnet20", "resnet18", "vgg16")
# The others take seconds to compile, and test_golden.py covers the two largest.
SMALL = ("mlp", "cnn", "resnet8", "vit")


def images(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=(*shape, 8, 8, 1)), jnp.float32)


def build(name, **options):
    return nnx.jit(lambda: MODELS[name](**options))()


def loss(apply, params, batch_stats, x):
    logits, batch_stats = apply(params, batch_stats, x, train=True)
    labels = jnp.arange(len(x)) % 3
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), batch_stats


def assert_close(actual, expected, tolerance=1e-5):
    chex.assert_trees_all_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", MODELS)
def test_trees_are_plain_and_keep_their_structure(name):
    params, batch_stats, apply = functional(nnx.eval_shape(MODELS[name]))
    assert (batch_stats == {}) == (name not in NORMALISED)

    def is_plain(tree):
        return isinstance(tree, jax.ShapeDtypeStruct) or (isinstance(tree, dict) and all(map(is_plain, tree.values())))

    assert is_plain(params)
    assert is_plain(batch_stats)
    for train in (False, True):
        logits, updated = jax.eval_shape(lambda *trees, t=train: apply(*trees, t), params, batch_stats, images(2))
        assert logits.shape == (2, 3)
        chex.assert_trees_all_equal_shapes_and_dtypes(updated, batch_stats)


@pytest.mark.parametrize("name", SMALL)
def test_equals_the_model_and_leaves_it_alone(name):
    model, x = build(name), images(4)
    params, batch_stats, apply = functional(model)
    run = jax.jit(apply, static_argnames="train")
    trained_logits, trained_stats = run(params, batch_stats, x, train=True)
    logits, same = run(params, trained_stats, x, train=False)
    chex.assert_trees_all_equal(same, trained_stats)
    chex.assert_trees_all_equal_shapes_and_dtypes(trained_stats, batch_stats)
    before = functional(model)[1]
    chex.assert_trees_all_equal(before, batch_stats)

    expected_trained, expected = nnx.jit(
        lambda model: (model(x), nnx.view(model, raise_if_not_found=False, use_running_average=True)(x))
    )(model)
    assert_close(trained_logits, expected_trained, 1e-4)
    assert_close(logits, expected, 1e-4)
    assert_close(trained_stats, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)), 1e-4)
    if name in NORMALISED:
        assert jnp.abs(trained_logits - logits).max() > 1e-3


@pytest.mark.parametrize("name", SMALL)
def test_vmap_over_batches_is_one_call_for_each(name):
    params, batch_stats, apply = functional(build(name))
    x = images(2, 3)
    gradient = jax.grad(lambda params, x: loss(apply, params, batch_stats, x), has_aux=True)
    stacked = jax.jit(jax.vmap(gradient, (None, 0)))(params, x)
    alone = [jax.jit(gradient)(params, row) for row in x]
    assert_close(stacked, jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone), 1e-4)


@pytest.mark.parametrize("name", SMALL)
def test_a_scan_equals_a_loop_that_compiles_once_and_learns(name):
    params, batch_stats, apply = functional(build(name))
    x = images(6)

    def step(carry, _):
        params, batch_stats = carry
        (value, batch_stats), grads = jax.value_and_grad(
            lambda params: loss(apply, params, batch_stats, x), has_aux=True
        )(params)
        return (jax.tree.map(lambda p, g: p - 0.05 * g, params, grads), batch_stats), value

    scanned, values = jax.lax.scan(step, (params, batch_stats), length=4)
    chex.clear_trace_counter()
    compiled, looped = jax.jit(chex.assert_max_traces(step, 1)), (params, batch_stats)
    for _ in range(4):
        looped, _ = compiled(looped, None)
    assert values[-1] < values[0]
    assert_close(scanned, looped, 1e-3)


def test_no_gradient_flows_through_the_statistics():
    params, batch_stats, apply = functional(build("resnet8"))
    grads = jax.grad(lambda p: sum(map(jnp.sum, jax.tree.leaves(apply(p, batch_stats, images(2), True)[1]))))(params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_state_other_than_batch_statistics_is_refused():
    class Dropping(nnx.Module):
        def __init__(self, rngs):
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

    with pytest.raises(ValueError, match="RngCount, RngKey; take dropout out"):
        functional(Dropping(nnx.Rngs(0)))


@pytest.mark.parametrize("name", ["cnn", pytest.param("resnet8", marks=pytest.mark.long), "vit"])
def test_bfloat16_is_close_to_float32_with_float32_parameters_and_logits(name):
    x, outputs = images(8), []
    for dtype in (jnp.float32, jnp.bfloat16):

        def run(x, dtype=dtype):
            params, batch_stats, apply = functional(MODELS[name](dtype=dtype))
            grads, updated = jax.grad(lambda p: loss(apply, p, batch_stats, x), has_aux=True)(params)
            return apply(params, batch_stats, x, train=False)[0], grads, updated

        outputs.append(jax.jit(run)(x))
    exact, rounded = outputs
    assert {leaf.dtype for leaf in jax.tree.leaves(outputs)} == {jnp.dtype(jnp.float32)}
    # Half a unit in the last place of bfloat16 is 2**-9, and deep models accumulate tens of roundings. Normalise by
    # running statistics, since those of only a few values would amplify the rounding errors.
    assert 0 < jnp.linalg.norm(rounded[0] - exact[0]) < 0.05 * jnp.linalg.norm(exact[0])
    difference = optax.global_norm(jax.tree.map(jnp.subtract, exact[1], rounded[1]))
    assert difference < 0.15 * optax.global_norm(exact[1])


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_parameters_get_bfloat16_gradients_and_float32_logits(name):
    options = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    params, batch_stats, apply = functional(nnx.eval_shape(lambda: MODELS[name](**options)))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    logits, _ = jax.eval_shape(lambda *trees: apply(*trees, True), params, batch_stats, images(2))
    assert logits.dtype == jnp.float32
    grads, _ = jax.eval_shape(
        jax.grad(lambda *trees: loss(apply, *trees), has_aux=True), params, batch_stats, images(2)
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, params)
