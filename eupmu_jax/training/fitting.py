"""Loops over batches of example ids; the data stays on the device, and only ids travel in each step."""

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from eupmu_jax import data
from eupmu_jax.objectives import cross_entropy


def id_batches(ids: np.ndarray, batch_size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Endless batches of ids, each pass over them in a new order; a batch may span two passes."""
    pending = np.empty(0, ids.dtype)
    while True:
        while len(pending) < batch_size:
            pending = np.concatenate([pending, rng.permutation(ids)])
        yield pending[:batch_size]
        pending = pending[batch_size:]


class Seconds(NamedTuple):
    """Time on the clock, and of the processor, which other work on the machine does not lengthen."""

    wall: float
    processor: float

    @classmethod
    def now(cls) -> "Seconds":
        """To be subtracted from a later one."""
        return cls(time.perf_counter(), time.process_time())

    def since(self, start: "Seconds") -> "Seconds":
        """The time from `start` to this one."""
        return Seconds(self.wall - start.wall, self.processor - start.processor)


class Fitted(NamedTuple):
    """A trained model: parameters, running statistics, the time it took and the examples it was shown."""

    params: chex.ArrayTree
    batch_stats: chex.ArrayTree
    seconds: Seconds
    examples: int


def fit(
    forward: Callable,
    params: chex.ArrayTree,
    batch_stats: chex.ArrayTree,
    images: chex.Array,
    labels: chex.Array,
    ids: np.ndarray,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    augment: bool = False,
    on_step: Callable[[], None] = lambda: None,
) -> Fitted:
    """Trains a classifier on the examples `ids` with Adam, cross-entropy and a cosine schedule.

    Args:
      forward: `forward(params, batch_stats, images, train) -> (logits, batch_stats)`, see `models.functional`.
      params, batch_stats: The initial ones; statistics are an empty dict for a model without BatchNorm.
      images, labels: The whole training set, on device.
      ids: Examples to train on.
      epochs, batch_size, learning_rate: The schedule decays from `learning_rate` to 0.
      seed: Seed of the order of the examples.
      augment: Whether images are cropped and flipped at random in each step, see `data.augment`.
      on_step: Called after each step, for a progress bar.

    Returns:
      The parameters after the last step, and what they cost.
    """
    batch_size = min(batch_size, len(ids))
    steps = epochs * (len(ids) // batch_size)
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))

    key = jax.random.key(seed)

    def step(params, batch_stats, state, images, labels, batch, count):
        shown = data.augment(jax.random.fold_in(key, count), images[batch]) if augment else images[batch]

        def loss(p):
            logits, new_stats = forward(p, batch_stats, shown, True)
            return cross_entropy(logits, labels[batch]), new_stats

        gradient, batch_stats = jax.grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), batch_stats, state

    state = optimizer.init(params)
    batches = id_batches(ids, batch_size, np.random.default_rng(seed))
    # The step donates its arguments; the caller keeps the initial ones.
    params, batch_stats = jax.tree.map(jnp.array, (params, batch_stats))
    step = jax.jit(step, donate_argnums=(0, 1, 2))
    compiled = step.lower(params, batch_stats, state, images, labels, next(batches), np.int32(0)).compile()
    start = Seconds.now()
    for count in range(steps):
        arguments = images, labels, next(batches), np.int32(count)
        params, batch_stats, state = compiled(params, batch_stats, state, *arguments)
        on_step()
    jax.block_until_ready(params)
    return Fitted(params, batch_stats, Seconds.now().since(start), steps * batch_size)


def predict(apply: Callable, params: chex.ArrayTree, images: chex.Array, batch_size: int = 2_000) -> np.ndarray:
    """Logits `(N, C)` of all images, computed in batches."""
    run = jax.jit(apply)
    return np.concatenate([run(params, images[i : i + batch_size]) for i in range(0, len(images), batch_size)])
