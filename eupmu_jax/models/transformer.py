"""Decoder-only transformer language model."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


class Block(nnx.Module):
    """Pre-norm residual block: self-attention, then a gelu MLP four times as wide.

    Args:
      width: Size of the residual stream, a multiple of `heads`.
      heads: Number of attention heads.
      causal: Whether a position attends only to itself and earlier ones.
      dtype: Dtype of the computation; by default the promoted dtype of activations and parameters.
      param_dtype: Dtype of the parameters.
      rngs: Source of the keys of the parameters.

    Example:
      >>> nnx.eval_shape(lambda: Block(width=8, heads=2, rngs=nnx.Rngs(0))(jnp.zeros((1, 5, 8)))).shape
      (1, 5, 8)
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        causal: bool = True,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.causal = causal
        self.attention_norm = nnx.LayerNorm(width, **options)
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, **options)
        self.mlp_norm = nnx.LayerNorm(width, **options)
        self.up = nnx.Linear(width, 4 * width, **options)
        self.down = nnx.Linear(4 * width, width, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps activations of shape `(n, length, width)` to activations of the same shape."""
        x = x + self.attention(self.attention_norm(x), is_causal=self.causal)
        return x + self.down(nnx.gelu(self.up(self.mlp_norm(x))))


class Transformer(nnx.Module):
    """Decoder-only language model with learned positions; its embedding is also its output layer.

    Args:
      vocab: Number of tokens.
      width: Size of the residual stream, a multiple of `heads`.
      layers: Number of blocks.
      heads: Number of attention heads per block.
      max_length: Longest sequence.
      rngs: Source of the keys of the parameters.

    Raises:
      ValueError: If `heads` does not divide `width`.

    Example:
      >>> make = lambda: Transformer(vocab=16, width=8, layers=1, heads=2, max_length=6, rngs=nnx.Rngs(0))
      >>> nnx.eval_shape(lambda: make()(jnp.zeros((2, 5), jnp.int32))).shape
      (2, 5, 16)
    """

    def __init__(
        self,
        vocab: int = 512,
        width: int = 256,
        layers: int = 4,
        heads: int = 4,
        max_length: int = 128,
        *,
        rngs: nnx.Rngs,
    ):
        # Small embeddings keep the first logits near zero, hence the first loss near log(vocab).
        init = nnx.initializers.normal(0.02)
        self.max_length = max_length
        self.tokens = nnx.Embed(vocab, width, embedding_init=init, rngs=rngs)
        self.positions = nnx.Embed(max_length, width, embedding_init=init, rngs=rngs)
        self.blocks = nnx.List(Block(width, heads, rngs=rngs) for _ in range(layers))
        self.norm = nnx.LayerNorm(width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Predicts every next token.

        Args:
          x: Tokens, integer, shape `(n, length)`.

        Returns:
          Logits of shape `(n, length, vocab)`; those at a position depend on no later token.

        Raises:
          ValueError: If `length` exceeds `max_length`.
        """
        length = x.shape[-1]
        # A gather past the end of the position table would be clamped or filled without an error.
        if length > self.max_length:
            raise ValueError(f"x: got sequences of {length} tokens, expected at most max_length, {self.max_length}")
        y = self.tokens(x) + self.positions(jnp.arange(length))
        for block in self.blocks:
            y = block(y)
        return self.tokens.attend(self.norm(y))
