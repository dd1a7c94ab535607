"""Token prediction as a task: batches are dicts of `tokens`, ints `(n, length)`, and perhaps `mask`."""

import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import optax

from eupmu_jax import objectives
from eupmu_jax.tasks.task import Task


@functools.lru_cache(maxsize=64)
def language(apply: Callable, *, fresh_params: Callable[[chex.PRNGKey], chex.ArrayTree] | None = None) -> Task:
    r"""The task of a causal language model, with the mean loss of the next token as its retain loss.

    .. math:: l = \frac{\sum_{i, t} m_{i, t}\, (-\log p(x_{i, t} \mid x_{i, < t}))}{\sum_{i, t} m_{i, t}}, \quad t \ge 1

    Forget losses, over the same tokens: `bounded_ascent` (leaves a token alone once its loss has reached that of a
    uniform guess, ln V), `random_labels` (other tokens, drawn anew in every pass over the forget set),
    `kl_to_uniform` and `gradient_ascent`. The divergence is the mean of KL(teacher || model) over all positions. The
    error of a sequence is the share of its tokens that the model would not have predicted, that is 1 less its exact
    memorisation.

    Args:
      apply: `apply(params, tokens) -> logits` of shape `(n, length, V)`; position t sees tokens up to t.
      fresh_params: `fresh_params(key)`: untrained parameters.

    Returns:
      The task; the same object for the same arguments. `mask` has the shape of `tokens` and marks those that are
      predicted (no prompt, no padding); without it all but the first are.

    Raises:
      ValueError: If `apply` is no function.

    >>> task = language(lambda params, tokens: jax.nn.one_hot(tokens + 1, 5) * params)
    >>> batch = {"tokens": jnp.array([[0, 1, 2, 0]])}
    >>> float(task.error(task.outputs(9.0, batch, None), batch)[0])
    0.3333...
    """
    if not callable(apply):
        raise ValueError(f"apply: got {apply!r}, expected a function (params, tokens) -> logits")

    def draw(key, epoch, batch):
        # Shares of the vocabulary, whose size only the logits tell.
        return batch | {"random_labels": jax.random.uniform(jax.random.fold_in(key, epoch), batch["tokens"].shape)}

    return Task(
        outputs=lambda params, batch, key: apply(params, batch["tokens"])[:, :-1],
        retain=_mean_loss,
        forget=FORGET,
        divergence=objectives.kl_to_teacher,
        draw=draw,
        error=_share_not_predicted,
        fresh_params=fresh_params,
    )


def _mask(batch):
    tokens = batch["tokens"][:, 1:]
    return batch["mask"][:, 1:].astype(jnp.float32) if "mask" in batch else jnp.ones(tokens.shape, jnp.float32)


def _mean(values, batch):
    mask = _mask(batch)
    return jnp.sum(values * mask) / jnp.maximum(jnp.sum(mask), 1)


def _losses(logits, tokens):
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens)


def _mean_loss(logits, batch):
    return _mean(_losses(logits, batch["tokens"][:, 1:]), batch)


def _bounded_ascent(logits, batch):
    return _mean(jnp.maximum(jnp.log(logits.shape[-1]) - _losses(logits, batch["tokens"][:, 1:]), 0), batch)


def _random_labels(logits, batch):
    vocabulary = logits.shape[-1]
    shift = 1 + (batch["random_labels"][:, 1:] * (vocabulary - 1)).astype(jnp.int32) % (vocabulary - 1)
    return _mean(_losses(logits, (batch["tokens"][:, 1:] + shift) % vocabulary), batch)


def _kl_to_uniform(logits, batch):
    return _mean(-jnp.mean(jax.nn.log_softmax(logits), axis=-1) - jnp.log(logits.shape[-1]), batch)


def _share_not_predicted(logits, batch):
    mask = _mask(batch)
    wrong = (jnp.argmax(logits, axis=-1) != batch["tokens"][:, 1:]) * mask
    return jnp.sum(wrong, axis=1) / jnp.maximum(jnp.sum(mask, axis=1), 1)


# One object for all tasks, so that equal tasks are equal.
FORGET = {
    "bounded_ascent": _bounded_ascent,
    "random_labels": _random_labels,
    "kl_to_uniform": _kl_to_uniform,
    "gradient_ascent": lambda logits, batch: -_mean_loss(logits, batch),
}
