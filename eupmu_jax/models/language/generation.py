"""Greedy generation with a key-value cache."""

import functools
import logging
from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np

from eupmu_jax._stack.checks import check_int
from eupmu_jax.models.language.adapter import LanguageModel

logger = logging.getLogger("eupmu_jax")
# Prompts are padded to a multiple of this, so that few lengths are compiled.
_MULTIPLE = 16
# Dtypes of the cache to try: None is that of the model as it was loaded.
DTYPES = None, "float32", "bfloat16"


def generate(
    model: LanguageModel,
    params: chex.ArrayTree,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    end: int | Sequence[int] | None = None,
) -> list[list[int]]:
    """Continues each prompt by greedy decoding.

    All prompts run in one compiled loop, which stops once every answer has ended. Each has its own cache, where the
    slot of a token is its position, and sees no padding. An answer therefore does not depend on the other prompts,
    except for rounding, which can break a tie between two tokens.

    It compiles once for each number of prompts and of end tokens, length of the longest prompt (rounded up to a
    multiple of 16) and `max_new_tokens`, whatever the parameters. Memory: the cache, and the logits of all prompts.

    Args:
      model: The model whose functions are used.
      params: Parameters like `model.params`, unlearned or not.
      prompts: The tokens of each prompt; lengths may differ, but must not be 0.
      max_new_tokens: The maximum number of tokens of an answer.
      end: The token that ends an answer, or several; without any, all answers have `max_new_tokens` tokens.

    Returns:
      The tokens of the answers, without prompt and end token. A warning is logged for prompts after which the logits
      are NaN, as those of a diverged model are.

    Raises:
      ValueError: Before any work: for no prompts or an empty one, tokens or an end token outside the vocabulary, no new
        tokens, or if the longest prompt and its answer may exceed the model's context. Also for parameters of such
        mixed dtypes that no cache fits them.

    >>> apply = lambda params, tokens: jax.nn.one_hot(tokens + params, 9)
    >>> decode = lambda params, tokens, positions, cache: (apply(params, tokens), cache)
    >>> model = LanguageModel(1, apply, None, decode, lambda n, length: {}, None, 0, 64)
    >>> generate(model, 1, [[3], [0, 5]], 4, end=7)
    [[4, 5, 6], [6]]
    """
    is_of_ints = lambda prompt: np.ndim(prompt) == 1 and (not len(prompt) or np.asarray(prompt).dtype.kind in "iu")
    if not all(map(is_of_ints, prompts)):
        raise ValueError("prompts: got one that is not a list of ints, expected a list of lists of tokens")
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or min(lengths) == 0:
        raise ValueError(f"prompts: got lengths {lengths}, expected at least one prompt, of at least one token each")
    check_int("max_new_tokens", max_new_tokens, 1, static=True)
    ends = [] if end is None else np.atleast_1d(np.asarray(end)).tolist()
    for token in ends:
        check_int("end", token, 0, static=True)
    if model.context is not None and max(lengths) + max_new_tokens > model.context:
        raise ValueError(
            f"prompts: got {max(lengths)} tokens and {max_new_tokens} new ones, expected at most the model's "
            f"context of {model.context}"
        )
    padded = np.zeros((len(prompts), -(-max(lengths) // _MULTIPLE) * _MULTIPLE), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    one = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    vocabulary = jax.eval_shape(jax.jit(model.apply), params, one).shape[-1]
    if wrong := [token for prompt in prompts for token in prompt if not 0 <= token < vocabulary]:
        raise ValueError(f"prompts: got token {wrong[0]}, expected tokens of the model, 0 to {vocabulary - 1}")
    if unknown := [token for token in ends if token >= vocabulary]:
        raise ValueError(f"end: got token {unknown[0]}, expected a token of the model, 0 to {vocabulary - 1}")
    given = params, padded, np.array(lengths), int(max_new_tokens), np.array(ends or [-1], np.int32)
    tokens, counts, lost = _generated(model, *given)
    if np.any(lost):
        logger.warning("params: the logits after %d of %d prompts are NaN", np.sum(lost), len(prompts))
    return [row[:count].tolist() for row, count in zip(np.asarray(tokens), np.asarray(counts), strict=True)]


def _generated(model, *given):
    """The result of `_run` with a cache of the first dtype that matches the model's keys."""
    for dtype in DTYPES:
        try:
            return _run(model.decode, model.empty_cache, *given, dtype)
        except TypeError as error:
            # The keys have another dtype than the cache.
            if "same dtypes" not in str(error):
                raise
    found = sorted({str(leaf.dtype) for leaf in jax.tree.leaves(given[0])})
    raise ValueError(
        f"params: got {', '.join(found)}, with which keys and values differ in dtype; expected those of the model, or "
        "a single one"
    )


@functools.partial(jax.jit, static_argnames=("decode", "empty_cache", "max_new_tokens", "dtype"))
def _run(decode, empty_cache, params, prompts, lengths, max_new_tokens, ends, dtype):
    n, width = prompts.shape

    # Mapped over single prompts, as google-tunix writes all rows of a batch to the same slots of its cache.
    @functools.partial(jax.vmap, in_axes=(0, 0, 0))
    def step(tokens, start, cache):
        positions = start + jnp.arange(tokens.shape[0])
        # Later slots hold padding or nothing, and are written before they are read.
        cache = {name: layer | {"end_index": start[None]} for name, layer in cache.items()}
        logits, cache = decode(params, tokens[None], positions[None], cache)
        return jnp.argmax(logits[0], axis=-1).astype(jnp.int32), jnp.any(jnp.isnan(logits[0]), axis=-1), cache

    as_keys = lambda leaf: leaf if dtype is None or leaf.dtype == jnp.int32 else leaf.astype(dtype)
    cache = jax.vmap(lambda _: jax.tree.map(as_keys, empty_cache(1, width + max_new_tokens)))(lengths)
    next_tokens, are_lost, cache = step(prompts, jnp.zeros_like(lengths), cache)
    last = lambda of_tokens: jnp.take_along_axis(of_tokens, lengths[:, None] - 1, axis=1)[:, 0]
    token, lost = last(next_tokens), last(are_lost)

    def unfinished(carry):
        i, token, done, *_ = carry
        return (i < max_new_tokens) & ~jnp.all(done | jnp.isin(token, ends))

    def body(carry):
        i, token, done, counts, answers, cache = carry
        done = done | jnp.isin(token, ends)
        answers = answers.at[:, i].set(token)
        counts = counts + ~done
        following, _, cache = step(token[:, None], lengths + i, cache)
        return i + 1, following[:, 0], done, counts, answers, cache

    start = (0, token, jnp.zeros(n, bool), jnp.zeros(n, jnp.int32), jnp.zeros((n, max_new_tokens), jnp.int32), cache)
    *_, counts, answers, _ = jax.lax.while_loop(unfinished, body, start)
    return answers, counts, lost
