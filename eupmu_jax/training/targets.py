"""Target scores of the examples to be forgotten, from scores that the original model gives to unseen data."""

import logging
from collections.abc import Collection
from typing import Any

import chex
import jax.numpy as jnp
import numpy as np

from eupmu_jax._stack.programs import fetched, jit_for_task
from eupmu_jax.objectives import transport_targets
from eupmu_jax.tasks import Task
from eupmu_jax.tasks.examples import part_of, spread
from eupmu_jax.training.classes import are_labelled, labels_of
from eupmu_jax.training.levels import MOST, batches_of, chunk_of

logger = logging.getLogger("eupmu_jax")
# Unseen scores below which quantiles are refused and doubted. With 50, the lowest tenth is known from five examples.
FEWEST, FEW = 5, 50
# Share of the forget set above which it is reported that targets are not below the scores, up to rounding.
EASIER, TOLERANCE = 0.5, 1e-3


def targets_of(
    task: Task, params: chex.ArrayTree, forget: Any, retain: Any, held_out: Any, gone: Collection
) -> tuple[np.ndarray, int]:
    """The target score of each example to be forgotten, `(n,)` in float32, and the examples passed to find them.

    Unseen examples are weighted so that their classes are mixed as in the forget set. An example of a class that is to
    be forgotten entirely gets a quantile of the scores that the model gives to that class on examples of other classes
    in the retain set: what a model that never saw the class would find it to be.

    Args:
      task: A task with a score.
      params: The original parameters.
      forget, retain, held_out: Sets, as `as_examples` returns them; `held_out` may be None.
      gone: Classes to be forgotten entirely, see `classes.classes_to_go`.

    Raises:
      ValueError: Without held-out examples, unless all examples belong to classes to be forgotten; for fewer than five
        that count, or scores that are not finite.
    """
    scores, passed = checked("forget", scores_of(task, params, forget)), len(forget)
    labels = labels_of(task, forget)
    stay = np.ones(len(forget), bool) if labels is None else ~np.isin(labels, list(gone))
    targets = np.empty(len(forget), np.float32)
    for label in sorted(gone):
        strangers = part_of(retain, spread(len(retain), MOST))
        other = checked("retain", scores_of(task, params, strangers, label))
        targets[labels == label] = transport_targets(scores[labels == label], other)
        passed += len(strangers)
    if stay.any():
        if held_out is None:
            raise ValueError(
                "held_out: got None, but the scores of unseen data are the targets of EUPMU transport; expected "
                "examples that the model never saw, or another method, such as EUPMU"
            )
        unseen, passed = checked("held_out", scores_of(task, params, held_out)), passed + len(held_out)
        weights = _weights(task, labels, stay, held_out, are_labelled(task, retain))
        if (counted := int(np.sum(weights > 0))) < FEWEST:
            raise ValueError(
                f"held_out: got {counted} examples of the classes to forget from, too few for quantiles of their "
                f"scores; expected at least {FEWEST}, better {FEW}"
            )
        if counted < FEW:
            logger.warning("held_out: got %d examples, whose quantiles are rough; better are %d or more", counted, FEW)
        targets[stay] = transport_targets(scores[stay], unseen, weights)
        _warn_of_easier(scores[stay], targets[stay])
    return targets, passed


def scores_of(task: Task, params: chex.ArrayTree, examples: Any, label: int | None = None) -> np.ndarray:
    """The task's score of each example, `(n,)`, or of `label` in place of its own."""
    batches = batches_of(examples, None, chunk_of(task, params, examples))
    parts = [_scores(task, params, batch, label) for batch in batches]
    return np.concatenate([np.asarray(fetched(part), np.float64) for part in parts])


def checked(name: str, scores: np.ndarray) -> np.ndarray:
    """The scores of the original model; raises `ValueError` for the first that is not finite, and names the set."""
    if not np.isfinite(scores).all():
        position = int(np.argmin(np.isfinite(scores)))
        raise ValueError(
            f"{name}: got a score of {scores[position]} at position {position} under the original model, expected "
            "finite scores"
        )
    return scores


def _scores(task, params, batch, label):
    if label is not None:
        batch = {**batch, "labels": np.full(len(batch["labels"]), label, np.asarray(batch["labels"]).dtype)}
    return _compiled_scores(task, params, batch)


@jit_for_task()
def _compiled_scores(task, params, batch):
    return jnp.asarray(task.score(task.outputs(params, batch, None), batch), jnp.float32)


def _weights(task, labels, stay, held_out, labelled):
    """The weight of each unseen example, so that classes are mixed as among the examples to forget that stay."""
    unseen = labels_of(task, held_out) if labelled and labels is not None else None
    if unseen is None:
        return np.ones(len(held_out))
    found, counts = np.unique(labels[stay], return_counts=True)
    weights = np.zeros(len(held_out))
    for label, count in zip(found, counts, strict=True):
        of_class = unseen == label
        if of_class.any():
            weights[of_class] = count / of_class.sum()
    return weights


def _warn_of_easier(scores, targets):
    """Warns if the original model is as sure of unseen data as of that to forget, which then stays as it is."""
    if np.mean(targets >= scores - TOLERANCE) > EASIER:
        logger.warning(
            "held_out: the original model is as sure of unseen examples as of most of those to forget, or surer, which "
            "then stay as they are; expected unseen data like the forget set"
        )
