"""Runs a language model on sequences in batches: losses of their tokens, and continuations."""

import functools
from collections.abc import Callable, Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np

from eupmu_jax._stack.checks import check_int
from eupmu_jax.models.language import LanguageModel, Tokenizer, generate
from eupmu_jax.objectives import language as losses


def token_by_token(
    apply: Callable, params: chex.ArrayTree, tokens: np.ndarray, batch: int
) -> tuple[np.ndarray, np.ndarray]:
    """The loss of every token but the first, and the most likely token there, `(n, length - 1)` each.

    Args:
      apply: As for `tasks.language`.
      params: Parameters of `apply`.
      tokens: Tokens of n sequences, `(n, length)`.
      batch: Sequences in a forward pass.

    Raises:
      ValueError: For less than one sequence in a forward pass.

    >>> nll, predicted = token_by_token(lambda p, tokens: jax.nn.one_hot(tokens + p, 4), 1, np.array([[0, 1, 3]]), 2)
    >>> nll.round(4), predicted.tolist()
    (array([[0.7437, 1.7437]], dtype=float32), [[1, 2]])
    """
    check_int("batch", batch, 1, static=True)
    count = len(tokens)
    # The last batch is padded, so that only one size is compiled.
    rows = np.arange(-(-count // batch) * batch).clip(max=count - 1).reshape(-1, batch)
    found = [_token_by_token(apply, params, tokens[chosen]) for chosen in rows]
    nll, predicted = (np.concatenate([np.asarray(part[k]) for part in found])[:count] for k in range(2))
    return nll, predicted


@functools.partial(jax.jit, static_argnums=0)
def _token_by_token(apply: Callable, params, tokens):
    logits = apply(params, tokens)[:, :-1]
    return losses.token_nll(logits, tokens[:, 1:]), jnp.argmax(logits, axis=-1)


def continued(
    language: LanguageModel,
    tokenizer: Tokenizer,
    params: chex.ArrayTree,
    prompts: Sequence[Sequence[int]],
    count: int,
    batch: int,
) -> list[str]:
    """The model's continuations of tokenized prompts, as texts of at most `count` tokens; `batch` prompts at a time.

    Blanks and line breaks around a text are kept: where one begins with a blank line, the answer before it is empty.

    Raises:
      ValueError: For less than one prompt at a time, and as in `generate`.
    """
    check_int("batch", batch, 1, static=True)
    made: list[list[int]] = []
    for start in range(0, len(prompts), batch):
        some = list(prompts[start : start + batch])
        # Padded as well.
        filled = some + some[:1] * (batch - len(some))
        made += generate(language, params, filled, count, end=(tokenizer.end, *tokenizer.stops))[: len(some)]
    return [tokenizer.decode(tokens) for tokens in made]
