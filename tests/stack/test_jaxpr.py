import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from eupmu_jax._stack.jaxpr import constants, equations, matmul_flops
from eupmu_jax.models.decoder import SIZES, Decoder


def convolve(x, kernel, **options):
    return jax.lax.conv_general_dilated(x, kernel, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options)


def scan(x, w, length=7):
    return jax.lax.scan(lambda y, _: (y @ w, None), x, length=length)[0]


A, B = jnp.ones((3, 5)), jnp.ones((5, 7))
BATCH, KERNEL, SQUARE = jnp.ones((2, 8, 8, 4)), jnp.ones((3, 3, 4, 6)), jnp.ones((5, 5))


@pytest.mark.parametrize(
    ("function", "arguments", "expected"),
    [
        (jnp.matmul, (A, B), 2 * 3 * 5 * 7),
        (jnp.dot, (A[0], A[0]), 2 * 5),
        (jnp.matmul, (jnp.ones((4, 3, 5)), jnp.ones((4, 5, 7))), 4 * 2 * 3 * 5 * 7),
        (lambda a, b: jnp.einsum("abc,cbd->ad", a, b), (jnp.ones((2, 3, 4)), jnp.ones((4, 3, 5))), 2 * 2 * 3 * 4 * 5),
        (jax.vmap(jnp.matmul, (0, None)), (jnp.ones((4, 3, 5)), B), 4 * 2 * 3 * 5 * 7),
        (jax.jit(jnp.matmul), (A, B), 2 * 3 * 5 * 7),
        (lambda x, k: convolve(x, k, window_strides=(1, 1), padding="SAME"), (BATCH, KERNEL), 2 * 128 * 6 * 36),
        (lambda x, k: convolve(x, k, window_strides=(1, 1), padding="VALID"), (BATCH, KERNEL), 2 * 72 * 6 * 36),
        (lambda x, k: convolve(x, k, window_strides=(2, 2), padding="SAME"), (BATCH, KERNEL), 2 * 32 * 6 * 36),
        (
            lambda x, k: convolve(x, k, window_strides=(1, 1), padding="SAME", feature_group_count=2),
            (BATCH, KERNEL[:, :, :2]),
            2 * 128 * 6 * 18,
        ),
        (scan, (A, SQUARE), 7 * 2 * 3 * 5 * 5),
        (lambda x, w: scan(x, scan(w, w, 2), 3), (A, SQUARE), 2 * 2 * 5**3 + 3 * 2 * 3 * 5 * 5),
        (lambda x, w: jax.lax.scan(lambda y, _: (scan(y, w, 2), None), x, length=3)[0], (A, SQUARE), 6 * 2 * 75),
        (lambda x, w: jax.lax.cond(x.sum() > 0, jnp.matmul, lambda x, w: x, x, w), (A, SQUARE), 2 * 3 * 5 * 5),
        (jax.grad(lambda a, b: (a @ b).sum(), (0, 1)), (A, B), 3 * 2 * 3 * 5 * 7),
    ],
)
def test_flops_of_known_programs(function, arguments, expected):
    assert matmul_flops(function, *arguments) == expected


def test_elementwise_operations_and_sums_do_not_count():
    assert matmul_flops(lambda x: jnp.tanh(x * x + 1).sum() + jnp.sort(x).mean() + x.T[0].max(), A) == 0


def test_only_shapes_are_needed():
    assert matmul_flops(jnp.matmul, *(jax.ShapeDtypeStruct((10**6, 10**6), jnp.float32),) * 2) == 2 * 10**18


@pytest.mark.parametrize("depth", [1, 4])
def test_a_checkpointed_chain_recomputes_its_forward_pass(depth):
    def chain(wrap):
        layer = wrap(lambda x, w: jnp.tanh(x @ w))
        return lambda ws, x: jax.lax.scan(lambda x, w: (layer(x, w), None), x, ws)[0].sum()

    def cost(wrap):
        return matmul_flops(jax.grad(chain(wrap), (0, 1)), jnp.ones((depth, 5, 5)), A)

    forward = depth * 2 * 3 * 5 * 5
    assert cost(lambda layer: layer) == 3 * forward
    assert cost(jax.checkpoint) == 4 * forward


@pytest.mark.parametrize("size", ["tiny", "7b"])
def test_the_flops_of_a_training_step_of_a_decoder_match_a_count_by_hand(size):
    """The backward pass recomputes each block but not the output layer, and the embedding is a look-up."""
    size, (n, length) = SIZES[size], (2, 16)
    graph, params = nnx.split(nnx.eval_shape(lambda: Decoder(size, rngs=nnx.Rngs(0))), nnx.Param)

    def loss(params, tokens):
        logits = nnx.merge(graph, params)(tokens)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens).mean()

    tokens, head = n * length, size.width // size.heads
    attention_weights = 2 * size.width * size.heads * head + 2 * size.width * size.kv_heads * head
    weights = attention_weights + 3 * size.width * size.hidden
    # Queries times keys and attention times values, over all pairs of positions, since masking saves nothing.
    pairs = 2 * n * size.heads * length**2 * head
    block = 2 * tokens * weights + 2 * pairs
    output = 2 * tokens * size.width * size.vocab
    inputs = jax.ShapeDtypeStruct((n, length), jnp.int32)
    assert matmul_flops(loss, params, inputs) == size.layers * block + output
    # The last product of a block is not recomputed, since nothing in the backward pass reads its result.
    again = block - 2 * tokens * size.width * size.hidden
    assert matmul_flops(jax.grad(loss), params, inputs) == size.layers * (3 * block + again) + 3 * output


def test_a_key_that_a_function_closes_over_is_a_constant_too():
    key = jax.random.key(7)
    (found,) = constants(lambda x: x + jax.random.normal(key), jnp.zeros(()))[:1]
    assert found.tolist() == jax.random.key_data(key).tolist()


def test_equations_are_counted_through_every_kind_of_call():
    def function(x):
        x = jax.jit(jax.checkpoint(jnp.sin))(x)
        x = jax.lax.scan(lambda y, _: (jax.lax.cond(y > 0, jnp.sin, jnp.cos, y), None), x, length=5)[0]
        return jax.lax.while_loop(lambda y: y > 1, jnp.sin, x)

    found = {}
    for equation, times in equations(function, 1.0):
        found[equation.primitive.name] = found.get(equation.primitive.name, 0) + times
    assert found["sin"] == 1 + 5 + 1
    assert found["cos"] == 5


def test_a_custom_derivative_is_counted_as_it_runs():
    @jax.custom_vjp
    def multiply(a, b):
        return a @ b

    multiply.defvjp(lambda a, b: (a @ b, (a, b)), lambda saved, g: (g @ saved[1].T, jnp.zeros_like(saved[1])))
    assert matmul_flops(multiply, A, B) == 210
    assert matmul_flops(jax.grad(lambda a, b: multiply(a, b).sum()), A, B) == 2 * 210


def test_constants_of_an_inner_jitted_function_are_found():
    weights = jnp.arange(3.0)
    found = constants(lambda x: jax.jit(lambda y: y * weights)(x), jnp.zeros(3))
    assert [value.tolist() for value in found] == [[0.0, 1.0, 2.0]]
