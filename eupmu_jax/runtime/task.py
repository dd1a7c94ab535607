"""The classification task: data, a split, a model, and its original and retrained parameters."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from eupmu_jax import data, metrics
from eupmu_jax.models import MLP, SmallCNN
from eupmu_jax.runtime import checkpoints, training


class Recipe(NamedTuple):
    """How the original and the retrained model are trained, with Adam and a cosine schedule."""

    epochs: int
    batch_size: int
    learning_rate: float


RECIPES = {
    ("digits", "mlp"): Recipe(150, 64, 1e-3),
    ("fashion_mnist", "mlp"): Recipe(100, 128, 1e-3),
    ("fashion_mnist", "cnn"): Recipe(30, 128, 1e-3),
}


def _mlp(dataset: data.Dataset, seed: int) -> MLP:
    pixels = dataset.train_images[0].size
    return MLP((pixels, 256, 256, dataset.num_classes), rngs=nnx.Rngs(seed))


def _cnn(dataset: data.Dataset, seed: int) -> SmallCNN:
    _, size, _, channels = dataset.train_images.shape
    return SmallCNN(dataset.num_classes, in_channels=channels, image_size=size, rngs=nnx.Rngs(seed))


MODELS: dict[str, Callable] = {"mlp": _mlp, "cnn": _cnn}


class Task(NamedTuple):
    """Everything an unlearning run needs.

    Attributes:
      dataset, split, seed: What is learned and what is to be forgotten.
      model: A key of `MODELS`.
      apply: `apply(params, images) -> logits`.
      images, labels: The training set, on device.
    """

    dataset: data.Dataset
    split: data.Split
    seed: int
    model: str
    apply: Callable
    images: chex.Array
    labels: chex.Array


class Model(NamedTuple):
    """Trained parameters, and the seconds and examples that training took."""

    params: chex.ArrayTree
    seconds: float
    examples: int


def make(name: str, forget: str, seed: int, *, size: int | None = None, model: str | None = None) -> Task:
    """Loads the data and draws the split; raises `ValueError` for an unknown name or an impossible forget set.

    Args:
      name, forget, seed: See `data.load` and `data.split`.
      size: Number of training examples to draw; all of them if None.
      model: "mlp" or "cnn"; None is "mlp" for digits and "cnn" for images.
    """
    model = model or ("mlp" if name == "digits" else "cnn")
    if name not in (names := list(dict.fromkeys(known_name for known_name, _ in RECIPES))):
        raise ValueError(f"name: got {name!r}, want {' or '.join(map(repr, names))}")
    dataset = data.load(name, seed=seed)
    if (name, model) not in RECIPES:
        known = [known_model for known_name, known_model in RECIPES if known_name == name]
        raise ValueError(f"model: got {model!r}, expected one of {', '.join(known)} for {name}")
    if size is not None:
        drawn = np.random.default_rng(seed).permutation(len(dataset.train_labels))[:size]
        dataset = dataset._replace(train_images=dataset.train_images[drawn], train_labels=dataset.train_labels[drawn])
    split = data.split(dataset.train_labels, forget, num_classes=dataset.num_classes, seed=seed)
    graph, _ = nnx.split(MODELS[model](dataset, 0))
    apply = lambda params, images: nnx.merge(graph, params)(images)
    images, labels = jnp.asarray(dataset.train_images), jnp.asarray(dataset.train_labels)
    return Task(dataset, split, seed, model, apply, images, labels)


def training_steps(task: Task, ids) -> int:
    """Optimizer steps that `train` makes on the examples `ids`."""
    recipe = RECIPES[task.dataset.name, task.model]
    return recipe.epochs * (len(ids) // min(recipe.batch_size, len(ids)))


def train(task: Task, ids, *, init_seed: int, cache: Path, on_step: Callable[[], None]) -> Model:
    """Trains on the examples `ids`, or returns the checkpoint in `cache` of the same training."""
    recipe = RECIPES[task.dataset.name, task.model]
    params = jax.tree.map(jnp.asarray, nnx.to_pure_dict(nnx.state(MODELS[task.model](task.dataset, init_seed))))
    meta = {
        "data": task.dataset.name,
        "size": len(task.labels),
        "model": task.model,
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


def evaluate(task: Task, params: chex.ArrayTree, **attack) -> dict:
    """UA, RA, TA, MIA and the losses over the whole sets; see `metrics.evaluate`, which takes `attack` too."""
    train_logits = training.predict(task.apply, params, task.images)
    test_logits = training.predict(task.apply, params, jnp.asarray(task.dataset.test_images))
    return metrics.evaluate(train_logits, test_logits, task.dataset, task.split, task.seed, **attack)
