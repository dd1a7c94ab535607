"""The classification task: data, a split, a model, and its original and retrained parameters."""

import functools
import hashlib
import json
import math
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


def _mlp(image_shape, num_classes, rngs) -> MLP:
    return MLP((math.prod(image_shape), 256, 256, num_classes), rngs=rngs)


def _cnn(image_shape, num_classes, rngs) -> SmallCNN:
    return SmallCNN(num_classes, in_channels=image_shape[2], image_size=image_shape[0], rngs=rngs)


# Each makes a model for images of shape (H, W, C), a number of classes, and `nnx.Rngs`.
MODELS: dict[str, Callable] = {"mlp": _mlp, "cnn": _cnn}


class Functions(NamedTuple):
    """A model as pure functions of plain pytrees."""

    apply: Callable
    fresh_params: Callable


@functools.cache
def functions(model: str, image_shape: tuple[int, int, int], num_classes: int) -> Functions:
    """The functions of a model; the same objects for the same arguments, so that compiled code is shared."""
    make = lambda rngs: MODELS[model](image_shape, num_classes, rngs)
    graph, _ = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    pure = lambda model: jax.tree.map(jnp.asarray, nnx.to_pure_dict(nnx.state(model)))
    return Functions(
        lambda params, images: nnx.merge(graph, params)(images),
        lambda key: pure(make(nnx.Rngs(key))),
    )


class Task(NamedTuple):
    """Everything an unlearning run needs.

    Attributes:
      dataset, split, seed: What is learned and what is to be forgotten.
      model, recipe: A key of `MODELS`, and how it is trained.
      apply: `apply(params, images) -> logits`.
      fresh_params: `fresh_params(key)`: parameters of an untrained model.
      images, labels: The training set, on device.
    """

    dataset: data.Dataset
    split: data.Split
    seed: int
    model: str
    recipe: Recipe
    apply: Callable
    fresh_params: Callable
    images: chex.Array
    labels: chex.Array


class Model(NamedTuple):
    """Trained parameters, and the seconds and examples that training took."""

    params: chex.ArrayTree
    seconds: float
    examples: int


def make(
    name: str,
    forget: str,
    seed: int,
    *,
    size: int | None = None,
    model: str | None = None,
    recipe: Recipe | None = None,
    dataset: data.Dataset | None = None,
) -> Task:
    """Loads the data and draws the split; raises `ValueError` for an unknown name or an impossible forget set.

    Args:
      name, forget, seed: See `data.load` and `data.split`.
      size: Number of training examples to draw; all of them if None.
      model: A key of `MODELS`; None is "mlp" for digits and "cnn" for images.
      recipe: None is that of `RECIPES`.
      dataset: The data, if they are loaded already.
    """
    dataset = dataset or data.load(name, seed=seed)
    model = model or ("mlp" if name == "digits" else "cnn")
    if recipe is None and (name, model) not in RECIPES:
        known = [known_model for known_name, known_model in RECIPES if known_name == name]
        raise ValueError(f"model: got {model!r}, expected one of {', '.join(known)} for {name}")
    if size is not None:
        drawn = np.random.default_rng(seed).permutation(len(dataset.train_labels))[:size]
        dataset = dataset._replace(train_images=dataset.train_images[drawn], train_labels=dataset.train_labels[drawn])
    split = data.split(dataset.train_labels, forget, num_classes=dataset.num_classes, seed=seed)
    pure = functions(model, dataset.train_images.shape[1:], dataset.num_classes)
    images, labels = jnp.asarray(dataset.train_images), jnp.asarray(dataset.train_labels)
    return Task(dataset, split, seed, model, recipe or RECIPES[name, model], *pure, images, labels)


def training_steps(task: Task, ids) -> int:
    """Optimizer steps that `train` makes on the examples `ids`."""
    return task.recipe.epochs * (len(ids) // min(task.recipe.batch_size, len(ids)))


def train(task: Task, ids, *, init_seed: int, cache: Path, on_step: Callable[[], None]) -> Model:
    """Trains on the examples `ids`, or returns the checkpoint in `cache` of the same training."""
    params = task.fresh_params(jax.random.key(init_seed))
    meta = {
        "data": task.dataset.name,
        "size": len(task.labels),
        "model": task.model,
        "ids": hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest(),
        "seed": task.seed,
        "init_seed": init_seed,
        "recipe": list(task.recipe),
        "structure": hashlib.sha256(str(jax.tree.map(jnp.shape, params)).encode()).hexdigest(),
        "jax": jax.__version__,
    }
    directory = cache / hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()[:16]
    if (found := checkpoints.load(directory, params, meta)) is not None:
        params, saved = found
        return Model(params, saved["seconds"], saved["examples"])
    fitted = training.fit(
        task.apply, params, task.images, task.labels, ids, **task.recipe._asdict(), seed=init_seed, on_step=on_step
    )
    checkpoints.save(directory, fitted.params, meta | {"seconds": fitted.seconds, "examples": fitted.examples})
    return Model(*fitted)


def evaluate(task: Task, params: chex.ArrayTree, **attack) -> dict:
    """UA, RA, TA, MIA and the losses over the whole sets; see `metrics.evaluate`, which takes `attack` too."""
    train_logits = training.predict(task.apply, params, task.images)
    test_logits = training.predict(task.apply, params, jnp.asarray(task.dataset.test_images))
    return metrics.evaluate(train_logits, test_logits, task.dataset, task.split, task.seed, **attack)
