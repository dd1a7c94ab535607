"""The classification task: data, a split, a model, and its original and retrained parameters."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from eupmu_jax import data, metrics
from eupmu_jax.models import MLP, SmallCNN
from eupmu_jax.runtime import checkpoints, training


class Recipe(NamedTuple):
    """How the original and the retrained model of a data set are trained, with Adam and a cosine schedule."""

    epochs: int
    batch_size: int
    learning_rate: float


RECIPES = {"digits": Recipe(150, 64, 1e-3), "fashion_mnist": Recipe(30, 128, 1e-3)}


class Task(NamedTuple):
    """Everything an unlearning run needs.

    Attributes:
      dataset, split, seed: What is learned and what is to be forgotten.
      apply: `apply(params, images) -> logits`.
      images, labels: The training set, on device.
    """

    dataset: data.Dataset
    split: data.Split
    seed: int
    apply: Callable
    images: chex.Array
    labels: chex.Array


class Model(NamedTuple):
    """Trained parameters, and the seconds and examples that training took."""

    params: chex.ArrayTree
    seconds: float
    examples: int


def make(name: str, forget: str, seed: int) -> Task:
    """Loads the data and draws the split; raises `ValueError` for an unknown name or an impossible forget set."""
    dataset = data.load(name, seed=seed)
    split = data.split(dataset.train_labels, forget, num_classes=dataset.num_classes, seed=seed)
    graph, _ = nnx.split(_model(dataset, 0))
    apply = lambda params, images: nnx.merge(graph, params)(images)
    return Task(dataset, split, seed, apply, jnp.asarray(dataset.train_images), jnp.asarray(dataset.train_labels))


def training_steps(task: Task, ids) -> int:
    """Optimizer steps that `train` makes on the examples `ids`."""
    recipe = RECIPES[task.dataset.name]
    return recipe.epochs * (len(ids) // min(recipe.batch_size, len(ids)))


def train(task: Task, ids, *, init_seed: int, cache: Path, on_step: Callable[[], None]) -> Model:
    """Trains on the examples `ids`, or returns the checkpoint in `cache` of the same training."""
    recipe = RECIPES[task.dataset.name]
    params = jax.tree.map(jnp.asarray, nnx.to_pure_dict(nnx.state(_model(task.dataset, init_seed))))
    meta = {
        "data": task.dataset.name,
        "ids": hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest(),
        "seed": task.seed,
        "init_seed": init_seed,
        "recipe": list(recipe),
        "structure": hashlib.sha256(str(jax.tree.map(jnp.shape, params)).encode()).hexdigest(),
        "jax": jax.__version__,
    }
    directory = cache / hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()[:16]
    if (found := checkpoints.load(directory, params, meta)) is not None:
        params, saved = found
        return Model(params, saved["seconds"], saved["examples"])
    fitted = training.fit(
        task.apply, params, task.images, task.labels, ids, **recipe._asdict(), seed=init_seed, on_step=on_step
    )
    checkpoints.save(directory, fitted.params, meta | {"seconds": fitted.seconds, "examples": fitted.examples})
    return Model(*fitted)


def evaluate(task: Task, params: chex.ArrayTree) -> dict:
    """UA, RA, TA, MIA and the losses over the whole sets; see `metrics.evaluate`."""
    train_logits = training.predict(task.apply, params, task.images)
    test_logits = training.predict(task.apply, params, jnp.asarray(task.dataset.test_images))
    return metrics.evaluate(train_logits, test_logits, task.dataset, task.split, task.seed)


def _model(dataset, seed):
    size, channels = dataset.train_images.shape[1], dataset.train_images.shape[3]
    if dataset.name == "digits":
        return MLP((size * size * channels, 256, 256, dataset.num_classes), rngs=nnx.Rngs(seed))
    return SmallCNN(dataset.num_classes, in_channels=channels, image_size=size, rngs=nnx.Rngs(seed))
