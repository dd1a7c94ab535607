import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from eupmu_jax.models import MLP, VGG16, ResNet8, ResNet18, ResNet20, SmallCNN, Transformer, ViT
from eupmu_jax.models.resnet import ResidualBlock

pytestmark = pytest.mark.slow


def count(model, kind=nnx.Param):
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, kind)))


@pytest.mark.parametrize(
    ("build", "inputs", "logits", "parameters"),
    [
        (lambda rngs: MLP((784, 1024, 1024, 1024, 10), rngs), (2, 28, 28, 1), (2, 10), 2_913_290),
        (lambda rngs: SmallCNN(10, rngs=rngs), (2, 28, 28, 1), (2, 10), 356_234),
        (lambda rngs: SmallCNN(10, (8, 16, 32), image_size=8, rngs=rngs), (2, 8, 8, 1), (2, 10), 11_402),
        (lambda rngs: ResNet8(10, rngs=rngs), (2, 32, 32, 3), (2, 10), 75_290),
        (lambda rngs: ResNet8(10, 1, rngs=rngs), (2, 28, 28, 1), (2, 10), 75_002),
        (lambda rngs: ResNet20(10, rngs=rngs), (2, 32, 32, 3), (2, 10), 269_722),
        (lambda rngs: ResNet18(10, rngs=rngs), (2, 32, 32, 3), (2, 10), 11_173_962),
        (lambda rngs: ResNet18(100, rngs=rngs), (2, 32, 32, 3), (2, 100), 11_220_132),
    ],
)
def test_shapes_and_parameter_counts(build, inputs, logits, parameters):
    model = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
    y = nnx.eval_shape(lambda model, x: model(x), model, jnp.ones(inputs))
    assert y.shape == logits
    assert y.dtype == jnp.float32
    assert count(model) == parameters


@pytest.mark.parametrize(("channels", "size", "classes"), [(3, 32, 10), (3, 32, 100), (1, 28, 10)])
def test_vgg16_has_the_layers_of_configuration_d(channels, size, classes):
    model = nnx.eval_shape(lambda: VGG16(classes, channels, rngs=nnx.Rngs(0)))
    widths = [channels, *[64] * 2, *[128] * 2, *[256] * 3, *[512] * 6]
    convolutions = sum((9 * inputs + 1) * outputs for inputs, outputs in itertools.pairwise(widths))
    parameters = convolutions + 2 * sum(widths[1:]) + 513 * classes
    assert count(model) == parameters
    if (channels, classes) == (3, 10):
        # The published vgg16_bn has 138,365,992 parameters. Subtract its three linear layers between 25,088, 4,096,
        # 4,096 and 1,000 units.
        published = 138_365_992 - 25_089 * 4_096 - 4_097 * 4_096 - 4_097 * 1_000
        assert parameters == published + 5_130 == 14_728_266
    logits = nnx.eval_shape(lambda model, x: model(x), model, jnp.ones((2, size, size, channels)))
    assert logits.shape == (2, classes)


@pytest.mark.parametrize(
    ("classes", "channels", "size", "patch", "width", "layers", "heads", "published"),
    [(1000, 3, 224, 16, 768, 12, 12, 86_567_656), (10, 3, 32, 4, 192, 12, 3, None), (10, 1, 28, 7, 64, 2, 2, None)],
)
def test_vit_has_the_parameter_count_of_its_formula(classes, channels, size, patch, width, layers, heads, published):
    model = nnx.eval_shape(lambda: ViT(classes, channels, size, patch, width, layers, heads, rngs=nnx.Rngs(0)))
    norm = 2 * width
    block = 2 * norm + 4 * width * (width + 1) + 4 * width * (width + 1) + (4 * width + 1) * width
    tokens = 1 + (size // patch) ** 2
    parameters = (
        (patch**2 * channels + 1) * width + (1 + tokens) * width + layers * block + norm + (width + 1) * classes
    )
    assert count(model) == parameters
    assert published in (None, parameters)
    logits = nnx.eval_shape(lambda model, x: model(x), model, jnp.ones((2, size, size, channels)))
    assert logits.shape == (2, classes)


def test_vit_refuses_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="patch_size must divide image_size, got 5 for 28"):
        ViT(image_size=28, patch_size=5, rngs=nnx.Rngs(0))
    model = ViT(10, 1, 8, width=6, layers=1, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"images of shape \(8, 8, 1\), got \(8, 8, 3\)"):
        model(jnp.zeros((1, 8, 8, 3)))
    with pytest.raises(ValueError, match="divisible"):
        ViT(width=8, heads=3, rngs=nnx.Rngs(0))


def test_every_parameter_of_the_cnn_gets_a_gradient_after_split_and_merge():
    model = nnx.jit(lambda: SmallCNN(10, (4, 4, 4), image_size=8, hidden=8, rngs=nnx.Rngs(0)))()
    graphdef, params = nnx.split(model)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 8, 8, 1)), jnp.float32)

    def loss(params, x):
        return jnp.sum(nnx.merge(graphdef, params)(x) ** 2)

    grads = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(params, x)
    assert all(np.any(g, axis=tuple(range(1, g.ndim))).all() for g in jax.tree.leaves(grads))


def test_resnet18_projects_only_where_shapes_change():
    model = nnx.eval_shape(lambda: ResNet18(10, rngs=nnx.Rngs(0)))
    assert [block.projects for block in model.blocks] == [False, False, True, False, True, False, True, False]
    assert [block.conv3.kernel.shape for block in model.blocks if block.projects] == [
        (1, 1, 64, 128),
        (1, 1, 128, 256),
        (1, 1, 256, 512),
    ]
    assert [block.stride for block in model.blocks] == [1, 1, 2, 1, 2, 1, 2, 1]


def test_a_strided_stem_gives_every_second_pixel_of_one_without_stride():
    strided, whole = (ResNet8(10, 1, stem_stride=stride, rngs=nnx.Rngs(0)) for stride in (2, 1))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 28, 28, 1)), jnp.float32)
    chex.assert_trees_all_equal(nnx.state(strided, nnx.Param), nnx.state(whole, nnx.Param))
    np.testing.assert_allclose(strided.conv(x), whole.conv(x)[:, ::2, ::2], rtol=1e-5, atol=1e-5)
    assert strided(x).shape == (2, 10)


def test_a_projecting_block_is_the_sum_of_two_branches():
    block = ResidualBlock(4, 8, stride=2, projection=True, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 6, 4)), jnp.float32)
    branch = block.norm2(block.conv2(nnx.relu(block.norm1(block.conv1(x)))))
    shortcut = jnp.einsum("nhwi,io->nhwo", x[:, ::2, ::2], block.conv3.kernel[0, 0])
    shortcut = (shortcut - shortcut.mean((0, 1, 2))) / jnp.sqrt(shortcut.var((0, 1, 2)) + 1e-5)
    np.testing.assert_allclose(block(x), nnx.relu(branch + shortcut), rtol=1e-4, atol=1e-4)


def test_mlp_needs_two_sizes():
    with pytest.raises(ValueError, match="features"):
        MLP((784,), nnx.Rngs(0))


@pytest.fixture(scope="module")
def transformer():
    build = nnx.jit(lambda: Transformer(vocab=32, width=16, layers=2, heads=2, max_length=12, rngs=nnx.Rngs(0)))
    return build()


def test_transformer_has_three_million_parameters_by_default():
    model = nnx.eval_shape(lambda: Transformer(rngs=nnx.Rngs(0)))
    assert count(model) == 3_323_392


def test_transformer_logits_depend_on_no_later_token(transformer):
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 32, (2, 12)))
    changed = tokens.at[:, 7].set((tokens[:, 7] + 1) % 32)
    before, after = transformer(tokens), transformer(changed)
    assert before.shape == (2, 12, 32)
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert jnp.all(jnp.any(before[:, 7:] != after[:, 7:], axis=-1))


def test_transformer_logits_depend_on_the_order_of_earlier_tokens(transformer):
    tokens = jnp.asarray([[1, 2, 3], [2, 1, 3]])
    first, second = transformer(tokens)
    assert jnp.abs(first[-1] - second[-1]).max() > 1e-4


def test_transformer_rejects_long_sequences(transformer):
    with pytest.raises(ValueError, match=r"^x: got sequences of 13 tokens, expected at most max_length, 12"):
        transformer(jnp.zeros((1, 13), jnp.int32))


def test_resnet_updates_its_statistics_only_in_training():
    model = nnx.jit(lambda: ResNet20(10, rngs=nnx.Rngs(0)))()
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 8, 3)), jnp.float32)
    assert count(model, nnx.BatchStat) == 1_376

    graphdef, params, before = nnx.split(model, nnx.Param, nnx.BatchStat)

    @jax.jit
    def run(x):
        trained = nnx.merge(graphdef, params, before, copy=True)
        evaluated = nnx.view(nnx.merge(graphdef, params, before, copy=True), use_running_average=True)
        trained(x)
        alone, together = evaluated(x[:1]), evaluated(x)
        return alone, together, nnx.state(evaluated, nnx.BatchStat), nnx.state(trained, nnx.BatchStat)

    alone, together, unchanged, changed = run(x)
    np.testing.assert_allclose(alone, together[:1], rtol=1e-4, atol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, before, unchanged)
    assert all(np.any(a != b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(changed), strict=True))
