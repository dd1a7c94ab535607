"""Ordinary training of a model, and its outputs on many examples."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from eupmu_jax._stack.checks import check_int, check_number
from eupmu_jax.tasks import Examples, Task
from eupmu_jax.training import checkpoints
from eupmu_jax.training._clock import Seconds
from eupmu_jax.training._inputs import check_examples, in_memory
from eupmu_jax.training._streams import id_batches


class Trained(NamedTuple):
    """A trained model, and the wall-clock and processor seconds that training took."""

    params: chex.ArrayTree
    seconds: float
    processor_seconds: float


class Fitted(NamedTuple):
    """A trained model: parameters, running statistics, the time it took and the examples it was shown."""

    params: chex.ArrayTree
    statistics: chex.ArrayTree
    seconds: Seconds
    examples: int


def steps_of(count: int, *, epochs: int, batch_size: int) -> int:
    """The number of optimizer steps that `fit` makes on `count` examples.

    >>> steps_of(100, epochs=2, batch_size=30), steps_of(10, epochs=2, batch_size=30)
    (6, 2)
    """
    return epochs * (count // min(batch_size, count))


def fit(
    loss: Callable,
    params: chex.ArrayTree,
    statistics: chex.ArrayTree,
    examples: Examples,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    average: float | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> Fitted:
    r"""Trains a model with Adam and a cosine schedule.

    Args:
      loss: `loss(params, statistics, batch, key) -> (scalar, statistics)`.
      params, statistics: Initial values; `statistics` is an empty dict for a model without BatchNorm.
      examples: The training set.
      epochs, batch_size, learning_rate: The schedule decays from `learning_rate` to 0.
      seed: Seed of the order of the examples and of the keys.
      average: Decay d of a moving average of the parameters, which is then returned instead; diffusion models are
        sampled from it. In step n = 0, 1, ... the decay is :math:`\min(d, (1 + n) / (10 + n))`, so that the first steps
        lose their weight. The average is kept in float32 at least, and returned in the dtype of the parameters.
      on_step: Called after each step, for a progress bar.

    Returns:
      The parameters after the last step, or their average, with the statistics and the cost of training.

    Raises:
      ValueError: For no examples, fewer than one epoch or example in a batch, or a learning rate that is negative or
        not finite.
    """
    if not len(examples):
        raise ValueError("examples: got an empty set, expected at least one example")
    for name, value in (("epochs", epochs), ("batch_size", batch_size)):
        check_int(name, value, 1, static=True)
    check_number("learning_rate", learning_rate, finite=True, least=0)
    batch_size = min(batch_size, len(examples))
    steps = steps_of(len(examples), epochs=epochs, batch_size=batch_size)
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))
    key = jax.random.key(seed)

    def step(params, statistics, state, averaged, tree, ids, count):
        batch = jax.tree.map(lambda leaf: leaf[ids], tree)
        step_key = jax.random.fold_in(key, count)
        gradient, statistics = jax.grad(loss, has_aux=True)(params, statistics, batch, step_key)
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        if average is not None:
            decay = jnp.minimum(average, (1 + count) / (10 + count))
            averaged = optax.incremental_update(params, averaged, 1 - decay)
        return params, statistics, state, averaged

    state = optimizer.init(params)
    batches = id_batches(examples.ids, batch_size, np.random.default_rng(seed))
    # The step donates its arguments; the caller keeps the initial ones.
    params, statistics = jax.tree.map(jnp.array, (params, statistics))
    # In bfloat16 an average would hardly move: most of its steps are smaller than the spacing of numbers.
    wide = lambda leaf: jnp.array(leaf, jnp.promote_types(leaf.dtype, jnp.float32))
    averaged = () if average is None else jax.tree.map(wide, params)
    tree = jax.tree.map(jnp.asarray, examples.tree)
    step = jax.jit(step, donate_argnums=(0, 1, 2, 3))
    carry = params, statistics, state, averaged
    compiled = step.lower(*carry, tree, next(batches), np.int32(0)).compile()
    start = Seconds.now()
    for count in range(steps):
        carry = compiled(*carry, tree, next(batches), np.int32(count))
        if jax.default_backend() == "cpu":
            # Otherwise all steps are queued at once, and a progress bar would be full at the start.
            jax.block_until_ready(carry)
        on_step()
    jax.block_until_ready(carry)
    params, statistics, _, averaged = carry
    like = lambda mean, leaf: mean.astype(leaf.dtype)
    returned = params if average is None else jax.tree.map(like, averaged, params)
    return Fitted(returned, statistics, Seconds.now().since(start), steps * batch_size)


def fit_task(task: Task, params: chex.ArrayTree, examples: Examples | chex.ArrayTree, **recipe: Any) -> Fitted:
    """Runs `fit` on the retain loss of a task, for a model without running statistics.

    Args:
      task: Any task; its `outputs` get a key of their own in each step.
      params: Initial values; not modified.
      examples: The training set in memory: a tree of arrays with a common leading axis, or `Examples`.
      **recipe: The other arguments of `fit`.

    Returns:
      The parameters and the cost of training; `statistics` is an empty dict.

    Raises:
      ValueError: Before the first step, for examples that are not in memory or that the task refuses.

    >>> from eupmu_jax.tasks import classification
    >>> task = classification(lambda w, inputs: inputs @ w, num_classes=2)
    >>> data = {"inputs": jnp.eye(2), "labels": jnp.arange(2)}
    >>> fitted = fit_task(task, jnp.zeros((2, 2)), data, epochs=9, batch_size=2, learning_rate=0.5, seed=0)
    >>> jnp.argmax(fitted.params, axis=1).tolist(), fitted.examples
    ([0, 1], 18)
    """
    examples = in_memory("examples", examples)
    check_examples("examples", examples, task, params)

    def loss(params, statistics, batch, key):
        return task.retain(task.outputs(params, batch, key), batch), statistics

    return fit(loss, params, {}, examples, **recipe)


def trained(cache: Path, like: chex.ArrayTree, meta: dict[str, Any], make: Callable[[], Fitted]) -> Trained:
    """The result of `make`, or its checkpoint in `cache` for the same metadata; see `checkpoints.cached`."""

    def made():
        fitted = make()
        return fitted.params, {"seconds": fitted.seconds.wall, "processor_seconds": fitted.seconds.processor}

    found, saved = checkpoints.cached(cache, like, meta, made)
    return Trained(found, saved["seconds"], saved["processor_seconds"])


def predict(apply: Callable, params: chex.ArrayTree, inputs: chex.Array, batch_size: int = 2_000) -> np.ndarray:
    """Outputs of all inputs, computed in batches."""
    run = jax.jit(apply)
    return np.concatenate([run(params, inputs[i : i + batch_size]) for i in range(0, len(inputs), batch_size)])
