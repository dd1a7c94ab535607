"""Relearning curves: how fast a few steps of fine-tuning bring back what was unlearned.

A model whose forgotten answers are only suppressed gives them again after steps that teach a retrained model next to
nothing. Compare each unlearned model with the retrained one, from the same steps:

- forget-side: train on a small part of the forget set and watch the rest of it;
- retain-only (arXiv 2505.22310): train on retain examples and watch the forget set.
"""

import functools
from typing import NamedTuple

import chex
import jax
import numpy as np
import optax

from eupmu_jax.tasks import Examples, Task
from eupmu_jax.training._streams import id_batches


class Curve(NamedTuple):
    """Accuracy on the watched examples against steps of fine-tuning.

    Attributes:
      step: `(P,)` ints, 0 first and the last step last.
      accuracy: `(P,)` percentages; UA is 100 less this.
    """

    step: np.ndarray
    accuracy: np.ndarray


def relearn(
    task: Task,
    params: chex.ArrayTree,
    train: Examples,
    watch: Examples,
    *,
    steps: int,
    every: int,
    batch_size: int,
    learning_rate: float = 1e-4,
    seed: int = 0,
) -> Curve:
    """Fine-tunes a model on its retain loss with Adam, and watches its accuracy on other examples.

    Models are compared by calls with the same arguments but `params`: they get the same batches and steps, and with the
    same task the step is compiled once for all of them.

    Args:
      task: With an `error`; accuracy is 100 less the mean error in percent.
      params: Of the model; left as they are.
      train: Examples to fine-tune on.
      watch: Examples to watch.
      steps, every: Optimizer steps, and how many of them between two measurements.
      batch_size: At most as many as there are in `train`.
      learning_rate: Constant.
      seed: Of the order of the examples.

    Returns:
      The curve; a classifier whose parameters stop being finite shows as one that names class 0 for all.

    Raises:
      ValueError: For a number below 1, an empty set, or a task without `error`.

    Example:
      >>> from eupmu_jax.tasks import as_examples, classification
      >>> task = classification(lambda w, x: x @ w, num_classes=2)
      >>> both = as_examples("train", {"inputs": jax.numpy.eye(2), "labels": jax.numpy.arange(2)})
      >>> curve = relearn(task, -jax.numpy.eye(2), both, both, steps=9, every=4, batch_size=2, learning_rate=0.5)
      >>> curve.step.tolist(), curve.accuracy.tolist()
      ([0, 4, 8, 9], [0.0, 100.0, 100.0, 100.0])
    """
    for name, value in (("steps", steps), ("every", every), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")
    for name, examples in (("train", train), ("watch", watch)):
        if not len(examples):
            raise ValueError(f"{name}: got no examples, expected at least one")
    if task.error is None:
        raise ValueError("task.error: got None, expected a function (outputs, batch) -> (n,)")
    batches = id_batches(train.ids, min(batch_size, len(train)), np.random.default_rng(seed))
    state = optax.adam(learning_rate).init(params)
    measured = {0: accuracy(task, params, watch)}
    for count in range(1, steps + 1):
        # A key, or a model of noisy examples would see the same noise in every step and learn that.
        key = jax.random.fold_in(jax.random.key(seed), count)
        params, state = _step(task, learning_rate, params, state, train.tree, next(batches), key)
        if count % every == 0 or count == steps:
            measured[count] = accuracy(task, params, watch)
    return Curve(np.array(list(measured)), np.array(list(measured.values())))


def accuracy(task: Task, params: chex.ArrayTree, examples: Examples, batch_size: int = 2_000) -> float:
    """100 less the mean of the task's error in percent, over a whole set in batches."""
    starts = range(0, len(examples), batch_size)
    parts = [examples[np.arange(i, min(i + batch_size, len(examples)))] for i in starts]
    return float(100 * np.mean(1 - np.concatenate([_error(task, params, part) for part in parts])))


@functools.partial(jax.jit, static_argnums=0)
def _error(task, params, batch):
    return task.error(task.outputs(params, batch, None), batch)


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
def _step(task, learning_rate, params, state, tree, ids, key):
    batch = jax.tree.map(lambda leaf: leaf[ids], tree)
    loss = lambda p: task.retain(task.outputs(p, batch, key), batch)
    updates, state = optax.adam(learning_rate).update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state
