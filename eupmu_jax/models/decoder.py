"""Decoder-only language model of the Llama family: its layers are one scanned, rematerialised block."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from eupmu_jax._stack.checks import check_int


class DecoderSize(NamedTuple):
    """Size of a `Decoder`.

    Attributes:
      vocab: Number of tokens.
      width: Size of the residual stream, a multiple of `heads`.
      layers: Number of blocks.
      heads: Query heads of a block.
      kv_heads: Key and value heads, each shared by `heads / kv_heads` query heads.
      hidden: Size of the gated MLP.
      tied: Whether the embedding is also the output layer.
      adapters: Rank of the low-rank adapters of every matrix in a block (Hu et al. 2021, arXiv 2106.09685), which are
        Flax NNX `LoRAParam`s next to the `Param`s; 0 for none.
    """

    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    hidden: int
    tied: bool = False
    adapters: int = 0


# Published sizes: SmolLM2-135M, Llama 3.2 1B, Llama 2 7B and 70B, Llama 3 8B; the first is for tests.
SIZES = {
    "tiny": DecoderSize(vocab=512, width=128, layers=2, heads=4, kv_heads=2, hidden=256, tied=True),
    "135m": DecoderSize(vocab=49_152, width=576, layers=30, heads=9, kv_heads=3, hidden=1_536, tied=True),
    "1b": DecoderSize(vocab=128_256, width=2_048, layers=16, heads=32, kv_heads=8, hidden=8_192, tied=True),
    "7b": DecoderSize(vocab=32_000, width=4_096, layers=32, heads=32, kv_heads=32, hidden=11_008),
    "8b": DecoderSize(vocab=128_256, width=4_096, layers=32, heads=32, kv_heads=8, hidden=14_336),
    "70b": DecoderSize(vocab=32_000, width=8_192, layers=80, heads=64, kv_heads=8, hidden=28_672),
}


def rotate(x: jax.Array, base: float = 10_000.0) -> jax.Array:
    """Rotary positions (Su et al. 2021): rotates pairs of features of `(n, length, heads, size)` by their position.

    The pairs are `(i, i + size / 2)`. Angles are computed in float32.

    >>> rotate(jnp.ones((1, 2, 1, 2)))[0, :, 0].round(3).tolist()
    [[1.0, 1.0], [-0.30..., 1.38...]]
    """
    length, size = x.shape[1], x.shape[-1]
    frequencies = base ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    angles = jnp.arange(length, dtype=jnp.float32)[:, None, None] * frequencies
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1).astype(x.dtype)


class DecoderBlock(nnx.Module):
    """Pre-norm residual block: causal grouped-query attention with rotary positions, then a gated MLP.

    Args:
      size: See `DecoderSize`.
      dtype: Dtype of the computation; parameters are float32.
      rngs: Source of the keys of the parameters.

    Example:
      >>> nnx.eval_shape(lambda: DecoderBlock(SIZES["tiny"], rngs=nnx.Rngs(0))(jnp.zeros((1, 5, 128)))).shape
      (1, 5, 128)
    """

    def __init__(self, size: DecoderSize, dtype: jax.typing.DTypeLike = jnp.float32, *, rngs: nnx.Rngs):
        def linear(inputs, outputs):
            if not size.adapters:
                return nnx.Linear(inputs, outputs, use_bias=False, dtype=dtype, rngs=rngs)
            adapters: dict[str, Any] = {"lora_rank": size.adapters, "lora_dtype": dtype}
            return nnx.LoRALinear(inputs, outputs, use_bias=False, dtype=dtype, rngs=rngs, **adapters)

        self.head_size = size.width // size.heads
        self.attention_norm = nnx.RMSNorm(size.width, dtype=dtype, rngs=rngs)
        self.query = linear(size.width, size.heads * self.head_size)
        self.key = linear(size.width, size.kv_heads * self.head_size)
        self.value = linear(size.width, size.kv_heads * self.head_size)
        self.out = linear(size.heads * self.head_size, size.width)
        self.mlp_norm = nnx.RMSNorm(size.width, dtype=dtype, rngs=rngs)
        self.gate = linear(size.width, size.hidden)
        self.up = linear(size.width, size.hidden)
        self.down = linear(size.hidden, size.width)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps activations of shape `(n, length, width)` to activations of the same shape."""
        y = self.attention_norm(x)
        query, key, value = (
            part.reshape(*part.shape[:-1], -1, self.head_size) for part in (self.query(y), self.key(y), self.value(y))
        )
        attended = jax.nn.dot_product_attention(rotate(query), rotate(key), value, is_causal=True)
        x = x + self.out(attended.reshape(*x.shape[:-1], -1))
        y = self.mlp_norm(x)
        return x + self.down(nnx.silu(self.gate(y)) * self.up(y))


class Decoder(nnx.Module):
    """Decoder-only language model with the architecture of Llama 2 (Touvron et al. 2023), up to 70B.

    The parameters of all blocks are stacked along a leading axis and scanned over, so program size and compile time do
    not grow with depth. Each block is recomputed in the backward pass (`jax.checkpoint`), so only its input is kept.

    Args:
      size: See `DecoderSize`; `SIZES` has some.
      dtype: Dtype of the computation; parameters and logits are float32.
      activations: On a mesh, the sharding of the residual stream `(n, length, width)` between blocks. With
        `NamedSharding(mesh, PartitionSpec("data"))` and parameters as in `decoder_shardings`, XLA gathers parameters
        and never activations.
      rngs: Source of the keys of the parameters.

    Raises:
      ValueError: If `heads` or `kv_heads` is below 1, `heads` does not divide `width` into even parts, or `kv_heads`
        does not divide `heads`.

    Example:
      >>> nnx.eval_shape(lambda: Decoder(SIZES["tiny"], rngs=nnx.Rngs(0))(jnp.zeros((2, 5), jnp.int32))).shape
      (2, 5, 512)
    """

    def __init__(
        self,
        size: DecoderSize,
        dtype: jax.typing.DTypeLike = jnp.float32,
        *,
        activations: NamedSharding | None = None,
        rngs: nnx.Rngs,
    ):
        for name in ("heads", "kv_heads"):
            check_int(f"size.{name}", getattr(size, name), 1, static=True)
        if size.width % size.heads:
            raise ValueError(f"size: got {size.heads} heads for a width of {size.width}, expected a divisor")
        if (size.width // size.heads) % 2:
            raise ValueError(f"size: got heads of width {size.width // size.heads}, expected an even width")
        if size.heads % size.kv_heads:
            raise ValueError(f"size: got {size.kv_heads} kv_heads for {size.heads} heads, expected a divisor")
        init = nnx.initializers.normal(0.02)
        self.activations = activations
        self.tokens = nnx.Embed(size.vocab, size.width, dtype=dtype, embedding_init=init, rngs=rngs)
        keys = nnx.split_rngs(splits=size.layers)
        self.blocks = keys(nnx.vmap(lambda rngs: DecoderBlock(size, dtype, rngs=rngs)))(rngs)
        self.norm = nnx.RMSNorm(size.width, dtype=dtype, rngs=rngs)
        self.head = None if size.tied else nnx.Linear(size.width, size.vocab, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits `(n, length, vocab)` of every next token, from tokens `(n, length)`."""
        graph, layers = nnx.split(self.blocks)

        def place(y):
            return y if self.activations is None else jax.lax.with_sharding_constraint(y, self.activations)

        @jax.checkpoint
        def block(y, layer):
            return place(nnx.merge(graph, layer)(y)), None

        y, _ = jax.lax.scan(block, place(self.tokens(x)), layers)
        y = self.norm(y)
        return (self.tokens.attend(y) if self.head is None else self.head(y)).astype(jnp.float32)


def decoder_shardings(params: chex.ArrayTree, mesh: Mesh) -> chex.ArrayTree:
    """Shardings of a `Decoder`'s parameters over mesh axes `data` (FSDP) and `model` (tensor, by heads and features).

    Matrices that read from the residual stream are split by their outputs along `model`, those that write to it by
    their inputs (Shoeybi et al. 2019), and the other dimension along `data`. Every device holds 1 / (data x model) of
    everything except the norms.

    Args:
      params: Parameters of a `Decoder`, arrays or `jax.ShapeDtypeStruct`s, as a pure dict.
      mesh: A mesh with axes `data` and `model` that divide the decoder's widths; `model` divides `kv_heads`.

    Returns:
      Tree of `NamedSharding`s.

    >>> from eupmu_jax.sharding import make_mesh
    >>> model = nnx.eval_shape(lambda: Decoder(SIZES["tiny"], rngs=nnx.Rngs(0)))
    >>> params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    >>> tuple(decoder_shardings(params, make_mesh())["blocks"]["down"]["kernel"].spec)
    (None, 'model', 'data')
    """
    layouts = {
        "embedding": ("model", "data"),
        "head": ("data", "model"),
        **dict.fromkeys(("query", "key", "value", "gate", "up"), (None, "data", "model")),
        **dict.fromkeys(("out", "down"), (None, "model", "data")),
    }

    def shard(path, _):
        names = [key.key for key in path]
        layout = next((layouts[name] for name in names if name in layouts), ())
        # Adapters are sharded like the matrix they add to, except along their rank.
        layout = {"lora_a": (*layout[:-1], None), "lora_b": (*layout[:-2], None, *layout[-1:])}.get(names[-1], layout)
        return NamedSharding(mesh, PartitionSpec(*layout))

    return jax.tree_util.tree_map_with_path(shard, params)
