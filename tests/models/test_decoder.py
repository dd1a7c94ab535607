import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from jax.sharding import PartitionSpec

from eupmu_jax.models.decoder import SIZES, Decoder, DecoderBlock, DecoderSize, decoder_shardings, rotate
from eupmu_jax.sharding import make_mesh

pytestmark = pytest.mark.slow

SMALL = DecoderSize(vocab=32, width=16, layers=3, heads=4, kv_heads=2, hidden=24)


def build(size=SMALL, **options):
    return nnx.jit(lambda: Decoder(size, **options, rngs=nnx.Rngs(0)))()


def shapes(size, **options):
    return nnx.eval_shape(lambda: Decoder(size, **options, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def model():
    return build()


def draw_tokens(n=2, length=12):
    return jnp.asarray(np.random.default_rng(0).integers(0, SMALL.vocab, (n, length)))


@pytest.mark.parametrize(
    ("size", "published"),
    [
        ("tiny", 361_088),
        ("135m", 134_515_008),
        ("1b", 1_235_814_400),
        ("7b", 6_738_415_616),
        ("8b", 8_030_261_248),
        ("70b", 68_976_648_192),
    ],
)
def test_parameter_counts_are_as_published(size, published):
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(shapes(SIZES[size]), nnx.Param))) == published


def test_logits_depend_on_no_later_token(model):
    tokens = draw_tokens()
    changed = tokens.at[:, 7].set((tokens[:, 7] + 1) % SMALL.vocab)
    before, after = nnx.jit(model)(tokens), nnx.jit(model)(changed)
    assert before.shape == (2, 12, SMALL.vocab)
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert jnp.all(jnp.any(before[:, 7:] != after[:, 7:], axis=-1))


def test_logits_depend_on_the_order_of_earlier_tokens(model):
    first, second = nnx.jit(model)(jnp.asarray([[1, 2, 3], [2, 1, 3]]))
    assert jnp.abs(first[-1] - second[-1]).max() > 1e-5


def test_the_scan_applies_the_blocks_one_by_one(model):
    graph, layers = nnx.split(model.blocks)
    y = model.tokens(draw_tokens())
    for i in range(SMALL.layers):
        before, y = y, nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], layers))(y)
        assert jnp.abs(y - before).max() > 1e-3
    np.testing.assert_allclose(model(draw_tokens()), model.head(model.norm(y)), rtol=1e-4, atol=1e-5)


def test_blocks_have_different_initial_weights(model):
    kernels = model.blocks.gate.kernel[...]
    assert kernels.shape == (SMALL.layers, SMALL.width, SMALL.hidden)
    assert jnp.abs(kernels[0] - kernels[1]).max() > 0.1


def test_a_tied_decoder_computes_its_logits_with_the_embedding():
    model = build(SMALL._replace(tied=True, layers=1))
    assert model.head is None
    tokens = jnp.where(draw_tokens() == 5, 6, draw_tokens())
    before = model(tokens)
    model.tokens.embedding[...] = model.tokens.embedding[...].at[5].multiply(2.0)
    np.testing.assert_allclose(model(tokens), before.at[..., 5].multiply(2.0), rtol=1e-5)


def test_rotation_turns_each_pair_of_features_by_its_frequency():
    x = jnp.asarray([1.0, 2.0, 3.0, 4.0])
    turned = rotate(jnp.broadcast_to(x, (1, 3, 1, 4)), base=100.0)[0, :, 0]
    for position in range(3):
        # The pairs are (1, 3) and (2, 4), with frequencies 1 and 1 / 10.
        pairs = np.array([1 + 3j, 2 + 4j]) * np.exp(1j * position * np.array([1.0, 0.1]))
        np.testing.assert_allclose(turned[position], [*pairs.real, *pairs.imag], rtol=1e-6)


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 50), st.integers(0, 2**31))
def test_inner_products_of_rotated_queries_and_keys_depend_only_on_their_distance(i, j, shift, seed):
    query, key = np.random.default_rng(seed).normal(size=(2, 8)).astype(np.float32)
    turn = lambda x: np.asarray(TURN(jnp.broadcast_to(x, (1, 91, 1, 8))))[0, :, 0]
    queries, keys = turn(query), turn(key)
    np.testing.assert_allclose(queries[i] @ keys[j], queries[i + shift] @ keys[j + shift], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(queries, axis=1), np.linalg.norm(query), rtol=1e-5)


TURN = jax.jit(rotate)


def test_rotations_of_distant_positions_are_exact_in_bfloat16():
    x = jnp.ones((1, 4096, 1, 8), jnp.bfloat16)
    turned, exact = rotate(x), rotate(x.astype(jnp.float32))
    assert turned.dtype == jnp.bfloat16
    np.testing.assert_allclose(turned.astype(jnp.float32), exact, atol=2**-8)


def attention(block, x):
    """Causal attention with the block's weights, head by head, without the library's attention."""
    y, heads = block.attention_norm(x), SMALL.heads
    split = lambda part: part.reshape(*part.shape[:-1], -1, block.head_size)
    query, key, value = rotate(split(block.query(y))), rotate(split(block.key(y))), split(block.value(y))
    shared = heads // key.shape[2]
    found = []
    for head in range(heads):
        scores = jnp.einsum("nqd,nkd->nqk", query[:, :, head], key[:, :, head // shared]) / block.head_size**0.5
        scores = jnp.where(jnp.tril(jnp.ones(scores.shape[1:], bool)), scores, -jnp.inf)
        found.append(jax.nn.softmax(scores) @ value[:, :, head // shared])
    return block.out(jnp.concatenate(found, axis=-1))


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_a_block_is_attention_followed_by_a_gated_mlp(kv_heads):
    block = nnx.jit(lambda: DecoderBlock(SMALL._replace(kv_heads=kv_heads), rngs=nnx.Rngs(0)))()
    assert block.key.kernel.shape == (SMALL.width, kv_heads * block.head_size)
    x = jax.random.normal(jax.random.key(0), (2, 7, SMALL.width))
    after = x + attention(block, x)
    y = block.mlp_norm(after)
    expected = after + (jax.nn.silu(y @ block.gate.kernel[...]) * (y @ block.up.kernel[...])) @ block.down.kernel[...]
    np.testing.assert_allclose(nnx.jit(block)(x), expected, rtol=1e-4, atol=1e-5)


def test_grouped_queries_are_ordinary_attention_with_repeated_keys_and_values():
    grouped = nnx.jit(lambda: DecoderBlock(SMALL, rngs=nnx.Rngs(0)))()
    full = nnx.jit(lambda: DecoderBlock(SMALL._replace(kv_heads=SMALL.heads), rngs=nnx.Rngs(0)))()
    state = nnx.to_pure_dict(nnx.state(grouped))
    for name in ("key", "value"):
        kernel = state[name]["kernel"].reshape(SMALL.width, SMALL.kv_heads, -1)
        repeated = jnp.repeat(kernel, SMALL.heads // SMALL.kv_heads, axis=1)
        state[name]["kernel"] = repeated.reshape(SMALL.width, -1)
    target = nnx.state(full)
    nnx.replace_by_pure_dict(target, state)
    nnx.update(full, target)
    x = jax.random.normal(jax.random.key(0), (2, 7, SMALL.width))
    np.testing.assert_allclose(nnx.jit(full)(x), nnx.jit(grouped)(x), rtol=1e-5, atol=1e-5)


def test_bfloat16_computation_gives_float32_logits_near_those_of_float32(model):
    half = build(dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(half, nnx.Param))} == {jnp.dtype(jnp.float32)}
    logits, exact = nnx.jit(half)(draw_tokens()), nnx.jit(model)(draw_tokens())
    assert logits.dtype == jnp.float32
    assert 0 < jnp.abs(logits - exact).max() < 0.05 * jnp.abs(exact).max()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        # BUG: a division by zero.
        ({"heads": 0}, r"^size.heads: got 0, expected an int of at least 1"),
        ({"kv_heads": 0}, r"^size.kv_heads: got 0, expected an int of at least 1"),
        ({"heads": 3}, r"^size: got 3 heads for a width of 16"),
        ({"kv_heads": 3}, r"^size: got 3 kv_heads for 4 heads"),
    ],
)
def test_the_error_names_the_size_that_does_not_divide(wrong, message):
    with pytest.raises(ValueError, match=message):
        shapes(SMALL._replace(**wrong))


def test_every_parameter_gets_a_gradient(model):
    graph, params = nnx.split(model, nnx.Param)
    tokens = jnp.concatenate([jnp.arange(SMALL.vocab), draw_tokens(1, 8)[0]])[None]

    @jax.jit
    @jax.grad
    def gradient(params):
        logits = nnx.merge(graph, params)(tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient(params)):
        assert np.all(np.any(leaf, axis=-1)), jax.tree_util.keystr(path)


@pytest.mark.parametrize("tied", [True, False])
def test_shardings_split_everything_but_the_norms(tied):
    params = nnx.to_pure_dict(nnx.state(shapes(SMALL._replace(tied=tied)), nnx.Param))
    found = decoder_shardings(params, make_mesh())
    chex.assert_trees_all_equal_structs(params, found)
    reads, writes = PartitionSpec(None, "data", "model"), PartitionSpec(None, "model", "data")
    expected = dict.fromkeys(("query", "key", "value", "gate", "up"), reads) | dict.fromkeys(("out", "down"), writes)
    for name, spec in expected.items():
        assert found["blocks"][name]["kernel"].spec == spec
        assert params["blocks"][name]["kernel"].ndim == len(spec)
    assert found["tokens"]["embedding"].spec == PartitionSpec("model", "data")
    norms = [found["norm"], found["blocks"]["attention_norm"], found["blocks"]["mlp_norm"]]
    assert all(norm["scale"].spec == PartitionSpec() for norm in norms)
    if not tied:
        assert found["head"]["kernel"].spec == PartitionSpec("data", "model")


def test_adapters_add_nothing_at_first_and_low_rank_matrices_after_training():
    size = SMALL._replace(adapters=2, layers=1)
    model, tokens = build(size), draw_tokens()
    graph, adapters, rest = nnx.split(model, nnx.LoRAParam, nnx.Param)
    loss = lambda adapters: jnp.mean(nnx.merge(graph, adapters, rest)(tokens) ** 2)
    gradient = nnx.to_pure_dict(jax.grad(loss)(adapters))["blocks"]
    for name in ("query", "key", "value", "out", "gate", "up", "down"):
        # Since B is zero, A has no gradient yet.
        assert not gradient[name]["lora"]["lora_a"].any()
        assert gradient[name]["lora"]["lora_b"].any()
    without = jax.tree.map(jnp.zeros_like, adapters)
    np.testing.assert_array_equal(nnx.merge(graph, without, rest)(tokens), model(tokens))
