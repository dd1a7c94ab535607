import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from eupmu_jax.models import Conv, conv2d

pytestmark = pytest.mark.slow


def reference(x, kernel, strides=(1, 1), padding="SAME"):
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def random(*shapes, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def output_and_gradients(convolve, x, kernel, *static):
    @jax.jit
    def run(x, kernel):
        y, vjp = jax.vjp(lambda x, kernel: convolve(x, kernel, *static), x, kernel)
        return y, *vjp(jnp.sin(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))

    return run(x, kernel)


def assert_trees_close(actual, expected, tolerance):
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=tolerance, atol=tolerance), actual, expected)


CASES = [
    ((3, 3), (1, 1), "SAME", (8, 8)),
    ((3, 3), (2, 2), "SAME", (7, 8)),
    ((3, 3), (2, 1), "VALID", (7, 9)),
    ((1, 1), (2, 2), "SAME", (5, 5)),
    ((2, 5), (1, 3), "SAME", (9, 7)),
    ((5, 2), (3, 2), "VALID", (6, 5)),
    ((3, 3), (1, 1), "VALID", (2, 5)),
    ((3, 3), (2, 2), ((1, 1), (1, 1)), (8, 7)),
    ((3, 2), (1, 2), ((2, 0), (0, 1)), (5, 6)),
]


@pytest.mark.parametrize(("kernel_size", "strides", "padding", "image"), CASES)
def test_equals_xla_in_float64(kernel_size, strides, padding, image):
    with jax.enable_x64(True):
        x, kernel = random((6, *image, 2), (*kernel_size, 2, 3), dtype=np.float64)
        actual = output_and_gradients(conv2d, x, kernel, strides, padding)
        assert {a.dtype for a in actual} == {np.dtype(np.float64)}
        assert_trees_close(actual, output_and_gradients(reference, x, kernel, strides, padding), 1e-10)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    st.tuples(*[st.integers(1, 4)] * 2),
    st.tuples(*[st.integers(1, 3)] * 2),
    st.sampled_from(["SAME", "VALID"]),
    st.tuples(*[st.integers(4, 9)] * 2),
    st.sampled_from([0, 1, 5, 12, 16]),
)
def test_equals_xla_in_float32(kernel_size, strides, padding, image, n):
    x, kernel = random((n, *image, 2), (*kernel_size, 2, 3))
    actual = output_and_gradients(conv2d, x, kernel, strides, padding)
    assert_trees_close(actual, output_and_gradients(reference, x, kernel, strides, padding), 1e-4)


def kernel_gradient(convolve):
    return jax.grad(lambda kernel, x: jnp.sum(jnp.sin(convolve(x, kernel))))


def test_vmap_gives_one_kernel_gradient_per_stacked_batch():
    x, kernel = random((2, 8, 6, 6, 2), (3, 3, 2, 3))
    actual = jax.jit(jax.vmap(kernel_gradient(conv2d), (None, 0)))(kernel, x)
    assert_trees_close(actual, jnp.stack([kernel_gradient(reference)(kernel, row) for row in x]), 1e-4)


def test_vmap_over_stacked_kernels():
    x, kernel = random((8, 6, 6, 2), (2, 3, 3, 2, 3))
    actual = jax.vmap(kernel_gradient(conv2d), (0, None))(kernel, x)
    assert_trees_close(actual, jnp.stack([kernel_gradient(reference)(row, x) for row in kernel]), 1e-4)


def descend(convolve, kernel, x):
    gradient = jax.vmap(kernel_gradient(convolve), (None, 0))
    return lax.scan(lambda kernel, _: (kernel - 0.01 * gradient(kernel, x).mean(0), None), kernel, length=3)[0]


def test_scan_over_vmapped_gradients():
    x, kernel = random((2, 4, 6, 6, 2), (3, 3, 2, 3))
    assert_trees_close(descend(conv2d, kernel, x), descend(reference, kernel, x), 1e-4)


def test_gradients_through_remat_match():
    x, kernel = random((4, 6, 6, 2), (3, 3, 2, 2))

    def twice(convolve, kernel):
        layer = jax.checkpoint(lambda x: jnp.sin(convolve(x, kernel)))
        return layer(layer(x)).sum()

    actual = jax.jit(jax.grad(lambda k: twice(conv2d, k)))(kernel)
    assert_trees_close(actual, jax.grad(lambda k: twice(reference, k))(kernel), 1e-4)


@pytest.mark.parametrize("outer", [jax.grad, jax.jacfwd])
def test_second_derivatives_match(outer):
    x, kernel = random((4, 5, 5, 2), (2, 2, 2, 2))

    def curvature(convolve):
        return jax.jit(outer(lambda k: jnp.sum(kernel_gradient(convolve)(k, x) ** 2)))(kernel)

    assert_trees_close(curvature(conv2d), curvature(reference), 1e-3)


def test_bfloat16_accumulates_in_float32():
    # Partial sums beyond 256 would lose odd counts in bfloat16.
    x, kernel = jnp.ones((24, 5, 5, 1), jnp.bfloat16), jnp.ones((1, 1, 1, 1), jnp.bfloat16)
    actual = jax.grad(lambda k: conv2d(x, k).astype(jnp.float32).sum())(kernel)
    assert actual.dtype == jnp.bfloat16
    assert actual.item() == 600

    x, kernel = random((16, 8, 8, 4), (3, 3, 4, 4), dtype=jnp.bfloat16)
    exact = kernel_gradient(reference)(kernel.astype(jnp.float32), x.astype(jnp.float32))
    actual = kernel_gradient(conv2d)(kernel, x).astype(jnp.float32)
    assert jnp.linalg.norm(actual - exact) < 0.02 * jnp.linalg.norm(exact)


@pytest.mark.parametrize(("platform", "convolutions"), [("cpu", 0), ("cuda", 1), ("tpu", 1)])
def test_kernel_gradient_is_chosen_when_lowering(platform, convolutions):
    x, kernel, dy = random((8, 6, 6, 2), (3, 3, 2, 3), (8, 6, 6, 3))
    gradient = jax.jit(lambda kernel: jax.vjp(lambda k: conv2d(x, k), kernel)[1](dy))
    program = gradient.trace(kernel).lower(lowering_platforms=(platform,)).as_text()
    assert program.count("stablehlo.convolution") == convolutions


def test_conv2d_rejects_bad_arguments():
    x, kernel = random((1, 4, 4, 2), (3, 3, 2, 1))
    with pytest.raises(ValueError, match="4-D"):
        conv2d(x[0], kernel)
    with pytest.raises(ValueError, match="'same'"):
        conv2d(x, kernel, (1, 1), "same")
    with pytest.raises(TypeError):
        conv2d(x, kernel.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("strides", "padding", "use_bias"), [(1, "SAME", True), (2, "VALID", True), ((1, 2), "SAME", False), (2, 1, False)]
)
def test_layer_equals_nnx_conv(strides, padding, use_bias):
    (x,) = random((4, 7, 7, 2))
    options = {
        "kernel_size": (3, 3),
        "strides": strides,
        "padding": padding,
        "use_bias": use_bias,
        "bias_init": nnx.initializers.normal(),
    }
    ours = Conv(2, 3, rngs=nnx.Rngs(0), **options)
    theirs = nnx.Conv(2, 3, rngs=nnx.Rngs(0), **options)
    assert_trees_close(nnx.state(ours).to_pure_dict(), nnx.state(theirs).to_pure_dict(), 0)

    def loss(layer):
        return jnp.sum(jnp.sin(layer(x)))

    assert_trees_close(nnx.grad(loss)(ours).to_pure_dict(), nnx.grad(loss)(theirs).to_pure_dict(), 1e-4)


def test_layer_computes_in_its_dtype():
    (x,) = random((2, 4, 4, 2))
    layer = Conv(2, 3, (3, 3), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert layer(x).dtype == jnp.bfloat16
    assert nnx.grad(lambda layer: layer(x).sum())(layer).kernel.dtype == jnp.float32


def test_layer_rejects_bad_arguments():
    with pytest.raises(ValueError, match="padding"):
        Conv(2, 3, (3, 3), padding="CIRCULAR", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="padding"):
        Conv(2, 3, (3, 3), padding=-1, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="two entries"):
        Conv(2, 3, (3,), rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="kernel_dilation"):
        Conv(2, 3, (3, 3), kernel_dilation=2, rngs=nnx.Rngs(0))
