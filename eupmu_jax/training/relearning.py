"""Relearning curves: how fast a few steps of fine-tuning bring back what was unlearned.

A model whose forgotten answers are only suppressed gives them again after steps that teach a retrained model next to
nothing. Compare each unlearned model with the retrained one, from the same steps:

- forget-side: train on a small part of the forget set and watch the rest of it;
- retain-only (arXiv 2505.22310): train on retain examples and watch the forget set.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import numpy as np
import optax

from eupmu_jax.metrics import accuracy
from eupmu_jax.objectives import cross_entropy
from eupmu_jax.training.fitting import id_batches, predict


class Curve(NamedTuple):
    """Accuracy on the watched examples against steps of fine-tuning.

    Attributes:
      step: `(P,)` ints, 0 first and the last step last.
      accuracy: `(P,)` percentages; UA is 100 less this.
    """

    step: np.ndarray
    accuracy: np.ndarray


def relearn(
    apply: Callable,
    params: chex.ArrayTree,
    images: chex.Array,
    labels: chex.Array,
    train_ids: np.ndarray,
    watch_ids: np.ndarray,
    *,
    steps: int,
    every: int,
    batch_size: int,
    learning_rate: float = 1e-4,
    seed: int = 0,
) -> Curve:
    """Fine-tunes a classifier by cross-entropy with Adam, and watches its accuracy on other examples.

    Models are compared by calls with the same arguments but `params`: they get the same batches and steps, and with the
    same `apply` object the step is compiled once for all of them.

    Args:
      apply: `apply(params, images) -> logits`.
      params: Of the model; left as they are.
      images, labels: The whole training set, on device.
      train_ids: Examples to fine-tune on.
      watch_ids: Examples to watch.
      steps, every: Optimizer steps, and how many of them between two measurements.
      batch_size: At most as many as there are `train_ids`.
      learning_rate: Constant.
      seed: Of the order of the examples.

    Returns:
      The curve; a model whose parameters stop being finite shows as one that names class 0 for all.

    Raises:
      ValueError: For a number below 1 or an empty set of ids.

    Example:
      >>> images, labels = jax.numpy.eye(2), jax.numpy.arange(2)
      >>> curve = relearn(lambda w, x: x @ w, -images, images, labels, np.arange(2), np.arange(2), steps=9, every=4,
      ...                 batch_size=2, learning_rate=0.5)
      >>> curve.step.tolist(), curve.accuracy.tolist()
      ([0, 4, 8, 9], [0.0, 100.0, 100.0, 100.0])
    """
    for name, value in (("steps", steps), ("every", every), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")
    train_ids, watch_ids = np.asarray(train_ids), np.asarray(watch_ids)
    for name, ids in (("train_ids", train_ids), ("watch_ids", watch_ids)):
        if ids.size == 0:
            raise ValueError(f"{name}: got no examples, expected at least one")
    watched, truth = images[watch_ids], np.asarray(labels[watch_ids])
    batches = id_batches(train_ids, min(batch_size, len(train_ids)), np.random.default_rng(seed))
    state = optax.adam(learning_rate).init(params)
    measured = {0: accuracy(predict(apply, params, watched), truth)}
    for count in range(1, steps + 1):
        params, state = _step(apply, learning_rate, params, state, images, labels, next(batches))
        if count % every == 0 or count == steps:
            measured[count] = accuracy(predict(apply, params, watched), truth)
    return Curve(np.array(list(measured)), np.array(list(measured.values())))


def area_between(curve: Curve, retrained: Curve) -> float:
    """Mean over the steps of how far a curve lies above the retrained model's, in percentage points.

    The integral of the difference by the trapezoidal rule, divided by the number of steps. 0 for a model that relearns
    as the retrained one does, positive for one that relearns faster or had not forgotten, at most 100. Negative is no
    proof of forgetting: a model pushed further from the answer than the retrained one first has to come back, and one
    that was only pushed very far looks slow in few steps. Look at the curves, and how steeply they rise once they do.

    Args:
      curve, retrained: Of `relearn` with the same arguments but the parameters.

    Raises:
      ValueError: If the curves were measured at different steps.

    Example:
      >>> steps = np.array([0, 10, 20])
      >>> area_between(Curve(steps, np.array([0.0, 80.0, 100.0])), Curve(steps, np.array([0.0, 0.0, 100.0])))
      40.0
    """
    if not np.array_equal(curve.step, retrained.step):
        raise ValueError(f"retrained: got steps {retrained.step}, expected those of curve, {curve.step}")
    return float(np.trapezoid(curve.accuracy - retrained.accuracy, curve.step) / curve.step[-1])


# The learning rate is an argument, not a constant of the program, so a sweep over it compiles once.
@functools.partial(jax.jit, static_argnums=0)
def _step(apply, learning_rate, params, state, images, labels, batch):
    loss = lambda p: cross_entropy(apply(p, images[batch]), labels[batch])
    updates, state = optax.adam(learning_rate).update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state
