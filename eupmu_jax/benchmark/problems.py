"""A classification problem: data, a forget set, and models trained on all or some of the data."""

import functools
import hashlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from eupmu_jax import data, metrics
from eupmu_jax.data import dataset as datasets
from eupmu_jax.models import MLP, VGG16, ResNet8, ResNet18, SmallCNN, ViT
from eupmu_jax.models.functional import fold, functional
from eupmu_jax.objectives import cross_entropy
from eupmu_jax.tasks import Examples, Task, as_examples, classification
from eupmu_jax.training import checkpoints, fitting


class Recipe(NamedTuple):
    """How the original and the retrained model are trained, with Adam and a cosine schedule."""

    epochs: int
    batch_size: int
    learning_rate: float


# The retrained model starts from other weights than the original, as an independent training would.
RETRAINED_SEED_OFFSET = 1_000

RECIPES = {
    ("digits", "mlp"): Recipe(150, 64, 1e-3),
    ("fashion_mnist", "mlp"): Recipe(100, 128, 1e-3),
    ("fashion_mnist", "cnn"): Recipe(30, 128, 1e-3),
}


# Each makes a model from the image shape (H, W, C), the number of classes, and `nnx.Rngs`.
MODELS: dict[str, Callable] = {
    "mlp": lambda shape, classes, rngs: MLP((math.prod(shape), 256, 256, classes), rngs=rngs),
    "cnn": lambda shape, classes, rngs: SmallCNN(classes, in_channels=shape[2], image_size=shape[0], rngs=rngs),
    "narrow-cnn": lambda shape, classes, rngs: SmallCNN(classes, (16, 32, 64), shape[2], shape[0], rngs=rngs),
    "resnet8": lambda shape, classes, rngs: ResNet8(classes, shape[2], rngs=rngs),
    "resnet8-stride2": lambda shape, classes, rngs: ResNet8(classes, shape[2], stem_stride=2, rngs=rngs),
    "resnet18": lambda shape, classes, rngs: ResNet18(classes, shape[2], rngs=rngs),
    "vgg16": lambda shape, classes, rngs: VGG16(classes, shape[2], rngs=rngs),
    "vit": lambda shape, classes, rngs: ViT(classes, in_channels=shape[2], image_size=shape[0], rngs=rngs),
}


class Functions(NamedTuple):
    """A model as pure functions of plain pytrees.

    Attributes:
      apply: `apply(params, images) -> logits`, for evaluation and unlearning; BatchNorm's statistics from training are
        folded into the parameters, so that no method changes them.
      fresh_params: `fresh_params(key)`: untrained parameters for `apply`.
      initial: `initial(key) -> (params, batch_stats)`, for training.
      forward: `forward(params, batch_stats, images, train) -> (logits, batch_stats)`, for training.
    """

    apply: Callable
    fresh_params: Callable
    initial: Callable
    forward: Callable


@functools.cache
def functions(model: str, image_shape: tuple[int, int, int], num_classes: int) -> Functions:
    """The functions of a model, cached so that equal arguments share compiled code."""
    make = lambda seed: functional(MODELS[model](image_shape, num_classes, nnx.Rngs(seed)))
    params, batch_stats, forward = make(0)
    _, neutral = fold(params, batch_stats)
    return Functions(
        lambda params, images: forward(params, neutral, images, False)[0],
        lambda key: fold(*make(key)[:2])[0],
        lambda key: make(key)[:2],
        forward,
    )


class Problem(NamedTuple):
    """A data set with a forget set, and a model.

    Attributes:
      dataset, split, seed: The data and their split into forget and retain set.
      model, recipe: A key of `MODELS`, and how it is trained.
      functions: The functions of the model.
      task: The task for unlearning.
      tree: The training set on device, a dict of `inputs` and `labels`.
      held_out: Examples that were taken out of the training set before anything else; None if there are none.
      augment: Whether the steps of training and unlearning see randomly cropped and flipped images.
    """

    dataset: data.Dataset
    split: data.Split
    seed: int
    model: str
    recipe: Recipe
    functions: Functions
    task: Task
    tree: dict[str, chex.Array]
    held_out: Examples | None = None
    augment: bool = False

    @property
    def forget(self) -> Examples:
        """The forget set."""
        return Examples(self.tree, self.split.forget_ids)

    @property
    def retain(self) -> Examples:
        """The retain set, of the same arrays."""
        return Examples(self.tree, self.split.retain_ids)


class Model(NamedTuple):
    """Trained parameters, with the wall-clock seconds, processor seconds and examples that training took."""

    params: chex.ArrayTree
    seconds: float
    processor_seconds: float
    examples: int


def make(
    name: str,
    forget: str,
    seed: int,
    *,
    size: int | None = None,
    held_out: int = 0,
    model: str | None = None,
    recipe: Recipe | None = None,
    dataset: data.Dataset | None = None,
    augment: bool = False,
) -> Problem:
    """Loads the data and draws the split; raises `ValueError` for an unknown name or an impossible forget set.

    Args:
      name, forget, seed: See `data.load` and `data.split`.
      size: Number of training examples to draw; all that remain if None.
      held_out: Number of training examples to take out first. No model is trained on them, and methods may measure
        unseen data on them, in place of the test set.
      model: A key of `MODELS`; None is "mlp" for digits and "cnn" for images.
      recipe: If None, the one in `RECIPES`.
      dataset: The data, if already loaded.
      augment: See `Problem`.
    """
    model = model or ("mlp" if name == "digits" else "cnn")
    if recipe is None and name not in (names := list(dict.fromkeys(known_name for known_name, _ in RECIPES))):
        raise ValueError(f"name: got {name!r}, expected {' or '.join(map(repr, names))}")
    dataset = dataset or data.load(name, seed=seed)
    if recipe is None and (name, model) not in RECIPES:
        known = [known_model for known_name, known_model in RECIPES if known_name == name]
        raise ValueError(f"model: got {model!r}, expected one of {', '.join(known)} for {name}")
    unseen = None
    if size is not None or held_out:
        drawn = np.random.default_rng(seed).permutation(len(dataset.train_labels))
        unseen = _part(dataset, drawn[:held_out]) if held_out else None
        dataset = _part(dataset, drawn[held_out:][:size])
    split = data.split(dataset.train_labels, forget, num_classes=dataset.num_classes, seed=seed)
    pure = functions(model, dataset.train_images.shape[1:], dataset.num_classes)
    task = classification(
        pure.apply, dataset.num_classes, fresh_params=pure.fresh_params, augment=data.augment if augment else None
    )
    recipe = recipe or RECIPES[name, model]
    kept = None if unseen is None else as_examples("held_out", as_tree(unseen))
    return Problem(dataset, split, seed, model, recipe, pure, task, as_tree(dataset), kept, augment)


def _part(dataset: data.Dataset, ids: np.ndarray) -> data.Dataset:
    return dataset._replace(train_images=dataset.train_images[ids], train_labels=dataset.train_labels[ids])


def as_tree(dataset: data.Dataset) -> dict[str, chex.Array]:
    """The training set of `dataset` on device."""
    return {"inputs": jnp.asarray(dataset.train_images), "labels": jnp.asarray(dataset.train_labels)}


def training_steps(problem: Problem, ids) -> int:
    """Optimizer steps that `train` makes on the examples `ids`."""
    return fitting.steps_of(len(ids), epochs=problem.recipe.epochs, batch_size=problem.recipe.batch_size)


def train(problem: Problem, ids, *, init_seed: int, cache: Path, on_step: Callable[[], None]) -> Model:
    """Trains on the examples `ids`, or returns the checkpoint of the same training from `cache`."""
    params, batch_stats = problem.functions.initial(jax.random.key(init_seed))
    meta = {
        "data": datasets.digest(problem.dataset),
        "model": problem.model,
        "ids": hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest(),
        "seed": problem.seed,
        "init_seed": init_seed,
        "recipe": list(problem.recipe),
        "structure": hashlib.sha256(str(jax.tree.map(jnp.shape, params)).encode()).hexdigest(),
        "jax": jax.__version__,
    } | ({"augment": True} if problem.augment else {})

    def make():
        loss = functools.partial(_training_loss, problem.functions.forward, problem.augment)
        examples = Examples(problem.tree, ids)
        fitted = fitting.fit(
            loss, params, batch_stats, examples, **problem.recipe._asdict(), seed=init_seed, on_step=on_step
        )
        folded, _ = fold(fitted.params, fitted.statistics)
        spent = {"seconds": fitted.seconds.wall, "processor_seconds": fitted.seconds.processor}
        return folded, spent | {"examples": fitted.examples}

    made, saved = checkpoints.cached(cache, params, meta, make)
    return Model(made, saved["seconds"], saved["processor_seconds"], saved["examples"])


def _training_loss(forward, augment, params, batch_stats, batch, key):
    shown = data.augment(key, batch["inputs"]) if augment else batch["inputs"]
    logits, batch_stats = forward(params, batch_stats, shown, True)
    return cross_entropy(logits, batch["labels"]), batch_stats


def logits_of(problem: Problem, params: chex.ArrayTree) -> tuple[np.ndarray, np.ndarray]:
    """Logits on the whole training and test set."""
    apply = problem.functions.apply
    train_logits = fitting.predict(apply, params, problem.tree["inputs"])
    return train_logits, fitting.predict(apply, params, jnp.asarray(problem.dataset.test_images))


def held_out_accuracy(problem: Problem, params: chex.ArrayTree) -> float:
    """Accuracy on the held-out examples in percent, without those of a class to be forgotten."""
    assert problem.held_out is not None
    tree = problem.held_out.tree
    labels = np.asarray(tree["labels"])
    kept = labels != (-1 if problem.split.forget_class is None else problem.split.forget_class)
    return metrics.accuracy(fitting.predict(problem.functions.apply, params, tree["inputs"])[kept], labels[kept])


def start_of(figures: Mapping[str, float]) -> dict[str, float]:
    """The argument `start` of `unlearn`, from the figures of the original model."""
    return {"retain_loss": figures["retain_loss"], "retain_error": 1 - figures["RA"] / 100}


def evaluate(problem: Problem, params: chex.ArrayTree, **attack) -> dict:
    """UA, RA, TA, attacks and losses over the whole sets; see `metrics.evaluate`, which takes `attack` too."""
    return metrics.evaluate(*logits_of(problem, params), problem.dataset, problem.split, problem.seed, **attack)
