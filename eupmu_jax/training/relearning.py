"""Relearning curves: how fast a few steps of fine-tuning bring back what was unlearned.

A model that only suppresses the forgotten answers gives them again after a few steps, which teach a retrained model
next to nothing. Compare each unlearned model with the retrained one, after the same steps:

- forget-side: train on a small part of the forget set and watch the rest of it;
- retain-only (arXiv 2505.22310): train on retain examples and watch the forget set.

`relearn_part` recovers what was hidden in one part of a model alone, such as the embedding row of a class.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from eupmu_jax._stack.checks import check_int, check_same_shapes
from eupmu_jax._stack.frozen import joined, mask_of, split
from eupmu_jax.tasks import Examples, Task
from eupmu_jax.training._inputs import check_examples, in_memory
from eupmu_jax.training._streams import id_batches
from eupmu_jax.training.levels import batches_of, chunk_of


class Curve(NamedTuple):
    """Accuracy on the watched examples against steps of fine-tuning.

    Attributes:
      step: `(P,)` ints, from 0 to the last step.
      accuracy: `(P,)` percentages; UA is 100 minus this.
    """

    step: np.ndarray
    accuracy: np.ndarray


def relearn(
    task: Task,
    params: chex.ArrayTree,
    train: Examples | chex.ArrayTree,
    watch: Examples | chex.ArrayTree,
    *,
    steps: int,
    every: int,
    batch_size: int,
    learning_rate: float = 1e-4,
    seed: int = 0,
    frozen: "Any | Callable[[Any], Any] | None" = None,
) -> Curve:
    """Fine-tunes a model on its retain loss with Adam, and tracks its accuracy on other examples.

    To compare models, call it with the same arguments except `params`: all models then see the same batches and steps,
    and with the same task object the step is compiled only once.

    Args:
      task: A task with an `error`; accuracy is 100 minus the mean error in percent. Pass `task.attacked`, since an
        attacker trains on the data, not on a distance to the original model.
      params: Parameters of the model; not modified.
      train: Examples to fine-tune on, in memory: a tree of arrays with a common leading axis, or `tasks.Examples`.
      watch: Examples on which accuracy is measured, in the same form.
      steps, every: Optimizer steps, and the number of steps between two measurements.
      batch_size: Examples in each step; at most all of `train`.
      learning_rate: Constant learning rate.
      seed: Seed of the order of the examples.
      frozen: Leaves to keep unchanged, as in `unlearn`; Adam has state for the others only.

    Returns:
      The curve. A classifier whose parameters are no longer finite counts as one that predicts class 0 for everything.

    Raises:
      ValueError: For a number below 1, an empty set, examples that are not in memory or that the task refuses, a task
        without `error`, or a `frozen` tree that does not match.

    Example:
      >>> from eupmu_jax.tasks import as_examples, classification
      >>> task = classification(lambda w, x: x @ w, num_classes=2)
      >>> both = as_examples("train", {"inputs": jax.numpy.eye(2), "labels": jax.numpy.arange(2)})
      >>> curve = relearn(task, -jax.numpy.eye(2), both, both, steps=9, every=4, batch_size=2, learning_rate=0.5)
      >>> curve.step.tolist(), curve.accuracy.tolist()
      ([0, 4, 8, 9], [0.0, 100.0, 100.0, 100.0])
    """
    for name, value in (("steps", steps), ("every", every), ("batch_size", batch_size)):
        check_int(name, value, 1, static=True)
    train, watch = in_memory("train", train), in_memory("watch", watch)
    for name, examples in (("train", train), ("watch", watch)):
        if not len(examples):
            raise ValueError(f"{name}: got no examples, expected at least one")
        check_examples(name, examples, task, params)
    if task.error is None:
        raise ValueError("task.error: got None, expected a function (outputs, batch) -> (n,)")
    batches = id_batches(train.ids, min(batch_size, len(train)), np.random.default_rng(seed))
    # Placed once, or every step would send the whole set to the device.
    tree = jax.tree.map(jnp.asarray, train.tree)
    free, fixed = split(mask_of(params, frozen), jax.tree.map(jnp.asarray, params))
    free = jax.tree.map(jnp.array, free)
    state = optax.adam(learning_rate).init(free)
    measured = {0: accuracy(task, params, watch)}
    for count in range(1, steps + 1):
        # Each step needs its own key, or a diffusion model would see the same noise in every step and learn it.
        key = jax.random.fold_in(jax.random.key(seed), count)
        free, state = _step(task, learning_rate, free, state, fixed, tree, next(batches), key)
        if count % every == 0 or count == steps:
            measured[count] = accuracy(task, joined(free, fixed), watch)
    return Curve(np.array(list(measured)), np.array(list(measured.values())))


def relearn_part(
    task: Task,
    params: chex.ArrayTree,
    part: chex.ArrayTree,
    examples: Examples | chex.ArrayTree,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float = 1e-2,
    seed: int = 0,
) -> chex.ArrayTree:
    """Fine-tunes only a part of a model on its retain loss, with Adam.

    With the images to forget as examples, and the embedding row of a class or word as the part, this is textual
    inversion (Gal et al. 2022, arXiv 2208.01618): what it recovers was in the rest of the network all along. Compare
    with a retrained model, from which some of it is recovered too.

    Args:
      task: Any task, or better its `attacked`, as in `relearn`. Use one object for all models that are compared, as
        each object compiles the steps once.
      params: Parameters of the model; not modified.
      part: Tree of bool arrays of the structure and shapes of `params`, True where a number may change.
      examples: As in `relearn`; batches are drawn from them with replacement.
      steps, batch_size: Optimizer steps, and examples in each.
      learning_rate: Constant learning rate.
      seed: Seed of the examples drawn and of all keys.

    Returns:
      The parameters, bitwise unchanged where `part` is False.

    Raises:
      ValueError: For a number below 1, an empty set, examples that are not in memory or that the task refuses, or a
        `part` of another structure, shape or dtype, or without any True.

    Example:
      >>> from eupmu_jax.tasks import as_examples, classification
      >>> task = classification(lambda w, x: x @ w, num_classes=2)
      >>> both = as_examples("examples", {"inputs": jnp.eye(2), "labels": jnp.arange(2)})
      >>> first = jnp.zeros((2, 2), bool).at[0].set(True)
      >>> relearn_part(task, jnp.zeros((2, 2)), first, both, steps=1, batch_size=8, learning_rate=0.5).round(3).tolist()
      [[0.5, -0.5], [0.0, 0.0]]
    """
    for name, value in (("steps", steps), ("batch_size", batch_size)):
        check_int(name, value, 1, static=True)
    examples = in_memory("examples", examples)
    if not len(examples):
        raise ValueError("examples: got none, expected at least one")
    check_examples("examples", examples, task, params)
    check_same_shapes("part", part, "params", params)
    if kinds := {str(jnp.result_type(flags)) for flags in jax.tree.leaves(part)} - {"bool"}:
        raise ValueError(f"part: got {', '.join(sorted(kinds))}, expected bools")
    if not any(bool(jnp.any(flags)) for flags in jax.tree.leaves(part)):
        raise ValueError("part: got no True, expected at least one number that may change")
    keys = jax.random.split(jax.random.key(seed), steps)
    tree = jax.tree.map(jnp.asarray, examples.tree)
    return _steps_of_part(task, batch_size, params, part, tree, jnp.asarray(examples.ids), keys, learning_rate)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _steps_of_part(task, batch_size, params, part, tree, ids, keys, learning_rate):
    optimizer = optax.adam(learning_rate)

    def step(carry, key):
        params, state = carry
        chosen = jax.random.choice(key, ids, (batch_size,))
        batch = jax.tree.map(lambda leaf: leaf[chosen], tree)
        slopes = jax.grad(lambda params: task.retain(task.outputs(params, batch, key), batch))(params)
        # Zero gradients keep Adam's moments, and so its updates, at 0 outside the part.
        slopes = jax.tree.map(lambda slope, changes: jnp.where(changes, slope, 0), slopes, part)
        updates, state = optimizer.update(slopes, state)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0]


def accuracy(task: Task, params: chex.ArrayTree, examples: Examples) -> float:
    """100 minus the mean of the task's error in percent, over a whole set in batches."""
    batches = batches_of(examples, chunk=chunk_of(task, params, examples))
    return float(100 * np.mean(1 - np.concatenate([_error(task, params, batch) for batch in batches])))


@functools.partial(jax.jit, static_argnums=0)
def _error(task, params, batch):
    return task.error(task.outputs(params, batch, None), batch)


def area_between(curve: Curve, retrained: Curve) -> float:
    """The mean height of a curve above the retrained model's, in percentage points.

    It is the integral of the difference by the trapezoidal rule, divided by the number of steps: 0 for a model that
    relearns as the retrained one does, positive for one that relearns faster or had not forgotten, and at most 100. A
    negative value does not prove forgetting. A model pushed further from the answer than the retrained one first has to
    come back, so over few steps it looks slow. Look at the curves, and at how steeply they rise once they do.

    Args:
      curve, retrained: Results of `relearn` with the same arguments except the parameters.

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
@functools.partial(jax.jit, static_argnums=0, donate_argnums=(2, 3))
def _step(task, learning_rate, free, state, fixed, tree, ids, key):
    batch = jax.tree.map(lambda leaf: leaf[ids], tree)
    loss = lambda part: task.retain(task.outputs(joined(part, fixed), batch, key), batch)
    updates, state = optax.adam(learning_rate).update(jax.grad(loss)(free), state, free)
    return optax.apply_updates(free, updates), state
