"""A decoder of google-tunix as pure functions of plain trees."""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from eupmu_jax._stack.checks import check_same_structure

logger = logging.getLogger("eupmu_jax")
# Attributes of every decoder of google-tunix that the functions here rely on.
PARTS = ("config", "embedder", "layers", "final_norm")


class LanguageModel(NamedTuple):
    """A causal language model: its parameters, and pure functions of them and of tokens `(n, length)`.

    Position t sees tokens up to t. Pad on the right: later tokens do not affect earlier positions, so no padding mask
    is needed.

    Attributes:
      params: Nested dicts of arrays.
      apply: `apply(params, tokens) -> logits` of shape `(n, length, V)`, as `tasks.language` takes it. It and `hidden`
        raise `ValueError` for sequences longer than the context.
      hidden: `hidden(params, tokens, layer) -> activations` of shape `(n, length, width)`: the residual stream after
        `layer` blocks. 0 is the embedding, `layers` the input of the last norm; `layer` is static under `jax.jit`.
      decode: `decode(params, tokens, positions, cache) -> (logits, cache)`: reads the keys and values of earlier
        positions from the cache. Tokens and positions have shape `(n, length)`; tokens must come in order, and the
        cache slot of a token is its position. Several tokens of Gemma 3 must start at position 0, as google-tunix
        computes the sliding windows of a later piece as if it started there; else `ValueError` is raised, unless
        positions are traced.
      empty_cache: `empty_cache(n, length)`: a cache with room for `length` tokens.
      module: `module(params)`: the Flax NNX model again, for other uses in google-tunix.
      layers: Number of blocks.
      context: The maximum number of tokens the model was trained for, or None if unknown.
    """

    params: chex.ArrayTree
    apply: Callable[[chex.ArrayTree, chex.Array], chex.Array]
    hidden: Callable[[chex.ArrayTree, chex.Array, int], chex.Array]
    decode: Callable[..., tuple[chex.Array, chex.ArrayTree]]
    empty_cache: Callable[[int, int], chex.ArrayTree]
    module: Callable[[chex.ArrayTree], Any]
    layers: int
    context: int | None


def from_tunix(model: Any, *, trainable: Any = nnx.Param, context: int | None = None) -> LanguageModel:
    """Splits a decoder of google-tunix into parameters and pure functions, which add positions and the causal mask.

    The functions work under `jax.jit`, `jax.grad`, `jax.vmap` and `jax.checkpoint`. State that is not trainable is
    closed over unchanged.

    In google-tunix 0.1.7 the Llama 3 and Qwen 3 classes compute rotary positions with base 1,000,000 whatever
    `config.rope_theta` says. This function keeps that behaviour; `load_huggingface` and `load_gguf` never return a
    model that is wrong because of it.

    Args:
      model: A text-only model of `tunix.models`: `llama3`, `qwen2`, `qwen3`, `gemma` or `gemma3`. It is not modified,
        but the trees share its arrays, so a program that donates them deletes those of the model.
      trainable: Flax NNX filter for the parameters, such as `nnx.LoRAParam` for a model with adapters. Use
        `nnx.update(model, params)` to put unlearned parameters back into the model.
      context: The maximum number of tokens the model was trained for.

    Raises:
      ValueError: If `model` is not such a model, or nothing in it is trainable.

    >>> from types import SimpleNamespace
    >>> from_tunix(SimpleNamespace(config=None))
    Traceback (most recent call last):
    ValueError: model: got SimpleNamespace without embedder, layers, final_norm, expected a decoder of google-tunix
    """
    if missing := [name for name in PARTS if not hasattr(model, name)]:
        found = f"{type(model).__name__} without {', '.join(missing)}"
        raise ValueError(f"model: got {found}, expected a decoder of google-tunix")
    graph = nnx.graphdef(model)
    params, rest = nnx.state(model, trainable, ...)
    adapters = jax.tree.leaves(nnx.state(model, nnx.LoRAParam))
    if 0 < len(adapters) < len(jax.tree.leaves(params)):
        logger.warning(
            "trainable: the model has %d arrays of adapters, but %d other arrays would be trained too; expected "
            "nnx.LoRAParam, for the adapters alone",
            len(adapters),
            len(jax.tree.leaves(params)) - len(adapters),
        )
    if not jax.tree.leaves(params):
        raise ValueError(f"trainable: got {trainable}, expected a filter that finds parameters of the model")
    return from_parts(graph, nnx.to_pure_dict(params), (rest,), model.config, context)


def from_parts(
    graph: nnx.GraphDef, params: chex.ArrayTree, rest: tuple, config: Any, context: int | None
) -> LanguageModel:
    """As `from_tunix`, from a model that is already split, so that parameters can be read into place."""
    depth = config.num_layers
    # That of Gemma 3; the windows of Gemma 2 are right.
    slides = hasattr(config, "local_base_frequency")
    # The cache has the dtype of the computation; classes without a dtype compute in that of their parameters.
    dtype = getattr(config, "dtype", None) or jnp.result_type(*jax.tree.leaves(params))

    shapes = jax.eval_shape(lambda: params)

    def module(given):
        try:
            # Copies the variables, not the arrays: variables from another trace are rejected by remat.
            return nnx.merge(graph, given, *rest, copy=True)
        except Exception:
            check_same_structure("params", given, "the model's", shapes)
            raise

    def apply(params, tokens):
        _check_length(tokens, context)
        return module(params)(tokens, _positions(tokens), None, _causal(tokens))[0]

    def hidden(params, tokens, layer):
        if not 0 <= layer <= depth:
            raise ValueError(f"layer: got {layer}, expected 0 to {depth}")
        _check_length(tokens, context)
        model = module(params)
        model.layers = nnx.List(list(model.layers)[:layer])
        stream = []

        def keep(x):
            stream.append(x)
            return x

        # Only the input of the last norm is kept; XLA removes the rest.
        model.final_norm = keep
        model(tokens, _positions(tokens), None, _causal(tokens))
        return stream[0]

    def decode(params, tokens, positions, cache):
        if slides and tokens.shape[1] > 1 and not isinstance(positions, jax.core.Tracer) and np.any(positions[:, 0]):
            raise ValueError(
                f"tokens: got {tokens.shape[1]} from position {int(np.max(positions[:, 0]))} on, where google-tunix "
                "computes the sliding windows of Gemma 3 wrongly; expected all from position 0 on, or one at a time"
            )
        slots = jnp.arange(cache["layer_0"]["k"].shape[1])
        seen = slots <= positions[:, :, None]
        return module(params)(tokens, positions, cache, seen)

    def empty_cache(n, length):
        shape = (n, length, config.num_kv_heads, config.head_dim)
        layer = {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype), "end_index": jnp.zeros(n, jnp.int32)}
        return {f"layer_{i}": dict(layer) for i in range(depth)}

    return LanguageModel(params, apply, hidden, decode, empty_cache, module, depth, context)


def _check_length(tokens, context):
    # A model also returns numbers beyond its context, but it was never trained on these positions.
    if context is not None and tokens.shape[1] > context:
        raise ValueError(
            f"tokens: got {tokens.shape[1]} in a sequence, expected at most the model's context of {context}"
        )


def _positions(tokens):
    return jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)


def _causal(tokens):
    n, length = tokens.shape
    return jnp.broadcast_to(jnp.tri(length, dtype=bool), (n, length, length))
