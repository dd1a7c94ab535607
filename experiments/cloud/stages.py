"""The two stages of `unlearn.py`, training and unlearning: settings, losses, optimizers, and the examples they read."""

import hashlib
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import numpy as np
import optax

import eupmu_jax as eupmu
from eupmu_jax import data
from eupmu_jax.objectives import cross_entropy, random_labels


class Settings(NamedTuple):
    """Defines the run; a checkpoint of other settings is refused.

    Attributes:
      data: "digits" or "fashion_mnist".
      forget: A whole class, class:N, or a random share of the training set, random:10%.
      method: Surgery on stacked gradients, or by a multiplier.
      rise: By how much the retain loss may rise, in nats.
      train_steps: Steps of training the original model.
      steps: Steps of unlearning.
      train_batch: Examples in a step of training, over all processes.
      forget_batch: Forget examples in a step of unlearning, over all processes.
      retain_batch: Retain examples in a step of unlearning, over all processes.
      learning_rate: Learning rate of unlearning.
      hidden: Width of the two hidden layers.
      seed: Seed of the split, the model, the order of the examples and the keys.
    """

    data: Literal["digits", "fashion_mnist"] = "digits"
    forget: str = "class:3"
    method: Literal["explicit", "implicit"] = "implicit"
    rise: float = 0.02
    train_steps: int = 1500
    steps: int = 200
    train_batch: int = 64
    forget_batch: int = 16
    retain_batch: int = 48
    learning_rate: float = 0.01
    hidden: int = 256
    seed: int = 0


class Stage(NamedTuple):
    """A part of the run, compiled for a mesh: its optimizer, its step, and the sets of examples it reads."""

    optimizer: optax.GradientTransformation
    step: Callable
    ids: list[np.ndarray]
    sizes: list[int]


def training(settings: Settings, apply: Callable, ids: np.ndarray) -> Stage:
    """Adam on the cross-entropy of the whole training set, with a cosine schedule."""
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-3, settings.train_steps))

    def step(params, state, batches, key):
        loss = lambda p: cross_entropy(apply(p, batches[0]["images"]), batches[0]["labels"])
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, {"loss": value}

    return Stage(optimizer, step, [ids], [settings.train_batch])


def unlearning(settings: Settings, apply: Callable, split: data.Split, num_classes: int) -> Stage:
    """Random labels for the forget set, redrawn with the key of each step, under a limit on the retain loss."""

    def forget_loss(params, batch, key):
        return cross_entropy(apply(params, batch["images"]), random_labels(key, batch["labels"], num_classes))

    def retain_loss(params, batch, key):
        return cross_entropy(apply(params, batch["images"]), batch["labels"])

    losses = [forget_loss, retain_loss]
    if settings.method == "explicit":
        limit = eupmu.tolerances.budget(settings.rise, 1.0 / settings.learning_rate, relative_to_start=True)
        descent = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(settings.learning_rate))
        optimizer = eupmu.skip_nonfinite(optax.chain(eupmu.unilateral_surgery(limit), descent))
        surgery = eupmu.explicit_step(losses, optimizer)
    else:
        limit = eupmu.tolerances.budget(settings.rise, 1.0, relative_to_start=True)
        steered = eupmu.implicit_surgery(limit, eupmu.controllers.nu_pi(20.0, 2.0), proxy="level")
        optimizer = eupmu.skip_nonfinite(optax.chain(optax.adam(settings.learning_rate), steered))
        surgery = eupmu.implicit_step(losses, optimizer)

    def step(params, state, batches, key):
        params, state, values = surgery(params, state, batches, key)
        return params, state, {"losses": values, "multipliers": eupmu.multipliers(state)}

    sizes = [settings.forget_batch, settings.retain_batch]
    return Stage(optimizer, step, [split.forget_ids, split.retain_ids], sizes)


def identity(settings: Settings, dataset: data.Dataset, split: data.Split) -> dict:
    """The settings, and hashes of the examples and of the split."""
    content = hashlib.sha256(dataset.train_images.tobytes() + dataset.train_labels.tobytes()).hexdigest()
    return settings._asdict() | {"sha256": content, "split": data.digest(split)}
