"""Classifiers as tasks: batches are dicts of `inputs` and int `labels`."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from eupmu_jax import objectives
from eupmu_jax._stack.checks import check_int
from eupmu_jax.objectives._logits import promoted
from eupmu_jax.tasks.examples import check_labels
from eupmu_jax.tasks.task import Task, check_function, drawn

# One object for all tasks, so that tasks from equal arguments are equal.
FORGET = {
    "bounded_ascent": lambda logits, batch: objectives.bounded_ascent(logits, batch["labels"]),
    "random_labels": lambda logits, batch: _of_possible(logits, drawn(batch)),
    "kl_to_uniform": lambda logits, batch: objectives.kl_to_uniform(logits),
    "gradient_ascent": lambda logits, batch: objectives.gradient_ascent(logits, batch["labels"]),
}


def classification(
    apply: Callable[[Any, Any], Any],
    num_classes: int,
    *,
    fresh_params: Callable[[chex.PRNGKey], Any] | None = None,
    augment: Callable[[chex.PRNGKey, Any], Any] | None = None,
) -> Task:
    """The task of a classifier, with cross-entropy as its retain loss.

    Forget losses: `bounded_ascent`, `random_labels` (drawn anew in every pass over the forget set, never the true
    label), `kl_to_uniform` and `gradient_ascent`, see `eupmu_jax.objectives`. The divergence is KL(teacher || model) of
    the softmax, the error 1 for a wrong answer and 0 for a right one, the score the log-odds of the true label.

    Args:
      apply: `apply(params, inputs) -> logits` of shape `(n, num_classes)`; `inputs` is any pytree of arrays. A model
        with running statistics or dropout is applied in evaluation mode. To unlearn with dropout, replace `outputs`,
        whose key is None in evaluation alone.
      num_classes: At least 2.
      fresh_params: `fresh_params(key)`: untrained parameters, which only Bad Teacher needs.
      augment: `augment(key, inputs) -> inputs`: applied to the inputs of a training step.

    Returns:
      The task; the same object for the same arguments.

    Raises:
      ValueError: For a function that is not callable or not hashable, or for fewer than two classes. `unlearn` refuses
        a different number of logits, batches without `inputs` and `labels`, and labels that are not `(n,)` classes.

    >>> task = classification(lambda params, inputs: inputs @ params, num_classes=3)
    >>> batch = {"inputs": jnp.eye(3), "labels": jnp.array([0, 1, 1])}
    >>> task.error(task.outputs(jnp.eye(3), batch, None), batch).tolist()
    [0.0, 0.0, 1.0]
    """
    check_int("num_classes", num_classes, 2, static=True)
    check_function("apply", apply, "a function (params, inputs) -> logits", 2)
    if fresh_params is not None:
        check_function("fresh_params", fresh_params, "a function of a key, or None", 1)
    if augment is not None:
        check_function("augment", augment, "a function (key, inputs) -> inputs, or None", 2)
    return _task(apply, int(num_classes), fresh_params, augment)


@functools.lru_cache(maxsize=64)
def _task(apply, num_classes, fresh_params, augment):
    def outputs(params, batch, key):
        inputs = batch["inputs"] if augment is None or key is None else augment(key, batch["inputs"])
        logits = apply(params, inputs)
        if not hasattr(logits, "shape"):
            found = type(logits).__name__
            raise ValueError(f"apply: returned {found}, expected logits of shape (n, {num_classes}) alone")
        return logits

    def draw(key, epoch, batch):
        drawn = objectives.random_labels(jax.random.fold_in(key, epoch), batch["labels"], num_classes)
        return {**batch, "random_labels": drawn}

    return Task(
        outputs=outputs,
        retain=_cross_entropy,
        forget=FORGET,
        divergence=objectives.kl_to_teacher,
        draw=draw,
        error=_is_wrong,
        fresh_params=fresh_params,
        num_classes=num_classes,
        check=functools.partial(_check, num_classes),
        score=_score,
    )


def _check(num_classes, batch):
    if not isinstance(batch, Mapping) or not {"inputs", "labels"} <= set(batch):
        given = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(f"batch: got {given}, expected a dict with inputs and labels")
    if np.ndim(batch["labels"]) != 1:
        raise ValueError(f"labels: got shape {np.shape(batch['labels'])}, expected (n,) ints")
    check_labels(batch["labels"], num_classes)


def _cross_entropy(logits, batch):
    return objectives.cross_entropy(logits, batch["labels"])


def _score(logits, batch):
    return objectives.log_odds(logits, batch["labels"])


def _of_possible(logits, labels):
    """The cross-entropy, with 0 for a label whose class is masked out by a logit of minus infinity."""
    losses = optax.softmax_cross_entropy_with_integer_labels(promoted(logits), labels)
    return jnp.mean(jnp.where(jnp.isposinf(losses), 0, losses))


def _is_wrong(logits, batch):
    return (jnp.argmax(logits, axis=-1) != batch["labels"]).astype(jnp.float32)
