"""The text encoder of Stable Diffusion 1.x: the text half of CLIP ViT-L/14."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from eupmu_jax.tasks.examples import check_labels

EPSILON = 1e-5


class TextEncoderConfig(NamedTuple):
    """Sizes of a `TextEncoder`; the default is that of CLIP ViT-L/14.

    Attributes:
      vocab: Number of tokens.
      length: Maximum number of tokens of a text.
      width: Size of the residual stream, a multiple of `heads`.
      layers: Number of blocks.
      heads: Number of attention heads.
    """

    vocab: int = 49_408
    length: int = 77
    width: int = 768
    layers: int = 12
    heads: int = 12


# TINY is for tests.
PUBLISHED = TextEncoderConfig()
TINY = TextEncoderConfig(vocab=20, length=7, width=12, layers=2, heads=3)


def quick_gelu(x: jax.Array) -> jax.Array:
    r"""The GELU that CLIP was trained with, :math:`x\, \sigma(1.702\, x)` (Hendrycks & Gimpel 2016, section 2).

    >>> round(float(quick_gelu(jnp.array(1.0))), 4)
    0.8458
    """
    return x * nnx.sigmoid(1.702 * x)


class _SelfAttention(nnx.Module):
    """Causal self-attention."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.heads = heads
        self.q_proj = nnx.Linear(width, width, rngs=rngs)
        self.k_proj = nnx.Linear(width, width, rngs=rngs)
        self.v_proj = nnx.Linear(width, width, rngs=rngs)
        self.out_proj = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        query, key, value = (
            layer(x).reshape(*x.shape[:-1], self.heads, -1) for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(jax.nn.dot_product_attention(query, key, value, is_causal=True).reshape(x.shape))


class _MLP(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.fc1 = nnx.Linear(width, 4 * width, rngs=rngs)
        self.fc2 = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(quick_gelu(self.fc1(x)))


class _Layer(nnx.Module):
    """Pre-norm residual block."""

    def __init__(self, config: TextEncoderConfig, *, rngs: nnx.Rngs):
        self.layer_norm1 = nnx.LayerNorm(config.width, epsilon=EPSILON, rngs=rngs)
        self.self_attn = _SelfAttention(config.width, config.heads, rngs=rngs)
        self.layer_norm2 = nnx.LayerNorm(config.width, epsilon=EPSILON, rngs=rngs)
        self.mlp = _MLP(config.width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class TextEncoder(nnx.Module):
    """Embeds texts for the U-Net of Stable Diffusion 1.x (Radford et al. 2021, arXiv 2103.00020).

    It is a causal transformer whose normalised last states are the embedding. The default configuration has 123,060,480
    parameters. Tokenisation is not included: the published tokenizer writes the token 49406, the text, and 49407 up to
    the full length. The embedding of the empty text stands for no condition.

    Args:
      config: Sizes.
      rngs: Source of the keys of the parameters.

    Raises:
      ValueError: If `heads` does not divide the width.

    Example:
      >>> nnx.eval_shape(lambda: TextEncoder(TINY, rngs=nnx.Rngs(0))(jnp.zeros((2, 7), int))).shape
      (2, 7, 12)
    """

    def __init__(self, config: TextEncoderConfig = PUBLISHED, *, rngs: nnx.Rngs):
        if config.width % config.heads:
            raise ValueError(f"config: got width {config.width}, expected a multiple of heads, {config.heads}")
        self.length, init = config.length, nnx.initializers.normal(0.02)
        self.token_embedding = nnx.Embed(config.vocab, config.width, embedding_init=init, rngs=rngs)
        self.position_embedding = nnx.Embed(config.length, config.width, embedding_init=init, rngs=rngs)
        self.layers = nnx.List(_Layer(config, rngs=rngs) for _ in range(config.layers))
        self.final_layer_norm = nnx.LayerNorm(config.width, epsilon=EPSILON, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps tokens, ints `(n, length)`, to embeddings `(n, length, width)`, none of which depends on later tokens.

        Raises:
          ValueError: If there are more tokens than positions, or for a token outside the vocabulary. Traced tokens
            cannot be checked; the embedding of an invalid one is NaN.
        """
        length = tokens.shape[-1]
        # A gather past the end of the position table would be clamped or filled without an error.
        if length > self.length:
            raise ValueError(f"tokens: got length {length}, expected at most {self.length}")
        check_labels(tokens, self.token_embedding.num_embeddings, "tokens")
        x = self.token_embedding(tokens) + self.position_embedding(jnp.arange(length))
        for layer in self.layers:
            x = layer(x)
        return self.final_layer_norm(x)
