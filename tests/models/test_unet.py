"""The small U-Net: its parameter count, its symmetry, what its output depends on, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from eupmu_jax.models.unet import UNet

T, LABELS = jnp.array([0, 900]), jnp.array([1, 3])


def build(**sizes):
    return UNet(3, in_channels=2, rngs=nnx.Rngs(0), **({"widths": (8, 16), "blocks": 1, "groups": 4} | sizes))


@pytest.fixture(scope="module")
def trained():
    """A model whose every parameter matters, as a function of its parameters, and the parameters."""
    graph, params = nnx.split(nnx.eval_shape(build), nnx.Param)
    rng = np.random.default_rng(1)
    draw = lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), leaf.dtype)
    params = jax.tree.map(draw, nnx.to_pure_dict(params))
    return jax.jit(lambda params, x, t, labels: nnx.merge(graph, params)(x, t, labels)), params


def images(rows=8, columns=8):
    return jnp.asarray(np.random.default_rng(2).standard_normal((2, rows, columns, 2)), jnp.float32)


def test_the_parameter_count_follows_from_the_layers():
    def block(inputs, width):
        shortcut = 0 if inputs == width else inputs * width + width
        return (
            2 * inputs
            + (9 * inputs * width + width)
            + (32 + 1) * 2 * width
            + 2 * width
            + (9 * width + 1) * width
            + shortcut
        )

    ends = (9 * 8 + 1) * 8 + 2 * 8 + (9 * 8 + 1) * 8
    condition = (8 + 1) * 32 + (32 + 1) * 32 + 4 * 32
    levels = block(8, 8) + (9 * 8 + 1) * 8 + block(8, 16) + 2 * 16 + 4 * (16 + 1) * 16
    levels += block(32, 16) + (9 * 16 + 1) * 8 + block(16, 8)
    counted = jax.tree.leaves(nnx.state(nnx.eval_shape(build), nnx.Param))
    assert sum(leaf.size for leaf in counted) == ends + condition + levels


@pytest.mark.slow
def test_the_first_prediction_is_zero(trained):
    apply, params = trained
    first = jax.jit(lambda: nnx.to_pure_dict(nnx.state(build(), nnx.Param)))()
    np.testing.assert_array_equal(apply(first, images(), T, LABELS), 0)
    # Because of the last layer only, not of those before it.
    assert np.any(apply(first | {"out": params["out"]}, images(), T, LABELS))


def transposed(path, leaf):
    """The parameters of the model with rows and columns swapped, in kernels and within patches."""
    names = [entry.key for entry in path]
    if leaf.ndim == 4:
        leaf = leaf.transpose(1, 0, 2, 3)
    pixels = np.arange(8).reshape(2, 2, 2).transpose(1, 0, 2).reshape(-1)
    if names == ["patches", "kernel"]:
        return leaf[:, :, pixels]
    return leaf[..., pixels] if names[0] == "out" else leaf


@pytest.mark.slow
def test_rows_and_columns_are_treated_alike(trained):
    apply, params = trained
    x = images()
    expected = apply(params, x, T, LABELS)
    turned = jax.tree_util.tree_map_with_path(transposed, params)
    found = apply(turned, x.swapaxes(1, 2), T, LABELS).swapaxes(1, 2)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(apply(params, x.swapaxes(1, 2), T, LABELS).swapaxes(1, 2) - expected).max() > 1e-2


def test_time_and_label_matter_and_examples_do_not_mix(trained):
    apply, params = trained
    x = images()
    found = apply(params, x, T, LABELS)
    for other in ((x, T.at[0].set(500), LABELS), (x, T, LABELS.at[0].set(0)), (x.at[0, 0, 0].add(1.0), T, LABELS)):
        changed = apply(params, *other)
        assert np.abs(changed[0] - found[0]).max() > 1e-4
        np.testing.assert_allclose(changed[1], found[1], atol=1e-6)


@pytest.mark.slow
def test_every_parameter_matters(trained):
    apply, params = trained
    x, leaves = images(), jax.tree_util.tree_leaves_with_path(params)
    found = apply(params, x, T, LABELS)

    def moves(path):
        # Change one entry along the first axis, since group norm removes shifts of all channels of a group.
        moved = jax.tree_util.tree_map_with_path(lambda p, leaf: leaf.at[1].add(0.1) if p == path else leaf, params)
        return np.abs(apply(moved, x, T, LABELS) - found).max() > 1e-4

    # A bias of the keys shifts all scores of a query equally, which softmax removes.
    still = [[str(entry.key) for entry in path] for path, _ in leaves if not moves(path)]
    assert still == [["attention", "key", "bias"]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widths": (8, 12)}, r"widths: got \(8, 12\), expected even multiples of groups, 4, and heads, 8"),
        ({"widths": ()}, r"widths: got \(\)"),
        ({"blocks": 0}, "blocks: got 0, expected an int of at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        build(heads=8, **change)


def test_an_image_that_cannot_be_halved_is_refused():
    with pytest.raises(ValueError, match=r"x: got shape \(2, 8, 6, 2\), expected .* multiples of 4"):
        nnx.eval_shape(lambda: build()(images(8, 6), T, LABELS))
