"""A diffusion model of small images that forgets a class: its training, its evaluation, and attacks on it.

By default it is a DiT of 0.3 million parameters on the 8 x 8 digits of scikit-learn; `FASHION_MNIST` is a U-Net of
0.6 million on clothes. Both predict v; the moving average of the trained parameters is unlearned and sampled. The judge
is a classifier trained on real images only.
"""

import functools
import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from eupmu_jax import data, tasks
from eupmu_jax.metrics.frechet import frechet_distance
from eupmu_jax.models import MLP
from eupmu_jax.models.dit import DiT
from eupmu_jax.models.sampling import sample
from eupmu_jax.models.unet import UNet
from eupmu_jax.objectives.diffusion import cosine_schedule
from eupmu_jax.tasks import Examples, Task
from eupmu_jax.training import fitting
from eupmu_jax.training.attacks import ROW_RATE, diffusion_attacks
from eupmu_jax.training.fitting import Trained, fit_task, trained
from eupmu_jax.training.relearning import relearn_part

CLASSES, SHAPE, SCHEDULE = 10, (8, 8, 1), cosine_schedule(1_000)
EPOCHS, BATCH, LEARNING_RATE, AVERAGE = 100, 64, 2e-3, 0.995
# Samples of the forgotten class, of each other class, and of the forgotten class after an attack.
FORGOTTEN, RETAINED, ATTACKED = 256, 32, 128
# Steps of retraining the row of the embedding.
RELEARNING = 200


@functools.cache
def digits() -> dict[str, np.ndarray]:
    """All 1,797 digits with pixels in [-1, 1], and their labels."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return {"inputs": (pixels / 8 - 1).astype(np.float32).reshape(-1, *SHAPE), "labels": labels.astype(np.int32)}


@functools.cache
def clothes() -> dict[str, np.ndarray]:
    """The 60,000 training images of Fashion-MNIST with pixels in [-1, 1], and their labels."""
    loaded = data.load("fashion_mnist")
    return {"inputs": 2 * loaded.train_images - 1, "labels": loaded.train_labels}


class Subject(NamedTuple):
    """Images of ten classes, and the networks that generate and judge them.

    Attributes:
      name, network: Names of the images and of the generating network, for caches.
      images: `images() -> {"inputs": ..., "labels": ...}`.
      make: `make(seed) -> module`, whose embedding of the conditions is `conditions`.
      shape: Shape of an image.
      epochs: Epochs of the network's training.
      judge, judge_epochs: Hidden layers of the classifier, and epochs of its training.
    """

    name: str
    network: str
    images: Callable[[], dict[str, np.ndarray]]
    make: Callable[[Any], nnx.Module]
    shape: tuple[int, ...]
    epochs: int
    judge: tuple[int, ...]
    judge_epochs: int


DIGITS = Subject("digits", "dit", digits, lambda seed: DiT(CLASSES, rngs=nnx.Rngs(seed)), SHAPE, EPOCHS, (128, 64), 60)
# Some 3,700 steps of training.
FASHION_MNIST = Subject(
    "fashion_mnist", "unet", clothes, lambda seed: UNet(CLASSES, rngs=nnx.Rngs(seed)), (28, 28, 1), 4, (256, 64), 5
)


def sets(forgotten: int, subject: Subject = DIGITS) -> tuple[Examples, Examples]:
    """The forget set, which is the images of one class, and the retain set of all others."""
    tree, labels = subject.images(), subject.images()["labels"]
    forget, retain = (Examples(tree, np.flatnonzero(part)) for part in (labels == forgotten, labels != forgotten))
    return forget, retain


@functools.cache
def functions(subject: Subject = DIGITS) -> tuple[Callable, Callable]:
    """The network as a function of its parameters, and a function from a key to fresh parameters."""
    graph, _ = nnx.split(subject.make(0), nnx.Param)
    fresh = lambda key: nnx.to_pure_dict(nnx.state(subject.make(key), nnx.Param))
    return lambda params, x_t, t, labels: nnx.merge(graph, params)(x_t, t, labels), fresh


def task(original: chex.ArrayTree | None = None, subject: Subject = DIGITS) -> Task:
    """The diffusion task; given `original`, its targets are those of that model."""
    denoise, fresh = functions(subject)
    return tasks.diffusion(denoise, SCHEDULE, num_conditions=CLASSES, original=original, fresh_params=fresh)


@functools.cache
def plain_task(subject: Subject = DIGITS) -> Task:
    """The task without an original model, cached so that all measurements share one object."""
    return task(subject=subject)


def steps_of(ids: np.ndarray, epochs: int = EPOCHS) -> int:
    """Optimizer steps that `train` makes on these examples."""
    return fitting.steps_of(len(ids), epochs=epochs, batch_size=BATCH)


def train(
    ids: np.ndarray,
    seed: int,
    cache: Path,
    epochs: int = EPOCHS,
    on_step: Callable[[], None] = lambda: None,
    subject: Subject = DIGITS,
) -> Trained:
    """Trains on these images alone, or returns the checkpoint of the same training from `cache`."""
    made = plain_task(subject)
    params = made.fresh_params(jax.random.key(seed))  # type: ignore[misc]
    recipe: dict[str, Any] = {"epochs": epochs, "batch_size": BATCH, "learning_rate": LEARNING_RATE, "average": AVERAGE}
    chosen = hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()
    meta = {"data": subject.name, "model": subject.network, "ids": chosen, "seed": seed, "recipe": recipe}
    meta |= {"jax": jax.__version__}

    examples = Examples(subject.images(), ids)
    make = lambda: fit_task(made, params, examples, seed=seed, on_step=on_step, **recipe)
    return trained(cache, params, meta, make)


@functools.cache
def classifier(subject: Subject = DIGITS) -> Callable:
    """A function `images -> (logits, features)` of a network trained on real images only."""
    graph, params = nnx.split(MLP((math.prod(subject.shape), *subject.judge, CLASSES), nnx.Rngs(0)), nnx.Param)
    made = tasks.classification(lambda params, x: nnx.merge(graph, params)(x), CLASSES)
    everything = Examples(subject.images(), np.arange(len(subject.images()["labels"])))
    options: dict[str, Any] = {"epochs": subject.judge_epochs, "batch_size": BATCH, "learning_rate": 1e-3, "seed": 0}
    fitted = nnx.merge(graph, fit_task(made, nnx.to_pure_dict(params), everything, **options).params)

    @jax.jit
    def both(images):
        hidden = images.reshape(len(images), -1)
        for layer in fitted.layers[:-1]:
            hidden = nnx.relu(layer(hidden))
        return fitted.layers[-1](hidden), hidden

    return both


def samples(params: chex.ArrayTree, labels: chex.Array, seed: int, subject: Subject = DIGITS, **options) -> chex.Array:
    """Images for these classes, by 50 DDIM steps with guidance 2 unless `options` of `sample` say otherwise."""
    key = jax.random.key(seed)
    return sample(functions(subject)[0], params, SCHEDULE, labels, subject.shape, key, nothing=CLASSES, **options)


def judge(params: chex.ArrayTree, forgotten: int, seed: int, subject: Subject = DIGITS) -> dict[str, float]:
    """Evaluates a model's samples; for the same seed, all models sample from the same noise.

    Returns:
      UA, % of the samples for the forgotten class that are classified as another; RA, % of those for the other classes
      that are classified as requested; FD, the Frechet distance between the classifier's features of the latter and of
      the real images of these classes.
    """
    kept = _retained_labels(forgotten)
    images = samples(params, jnp.asarray([forgotten] * FORGOTTEN + kept), seed, subject)
    ua = _not_shown(images[:FORGOTTEN], forgotten, subject)
    return {"UA": ua} | _of_retained(images[FORGOTTEN:], kept, forgotten, subject)


def judge_real(forgotten: int, seed: int, subject: Subject = DIGITS) -> dict[str, float]:
    """RA and FD of as many real images as `judge` has samples of the other classes, drawn by the seed.

    The classifier was trained on them, so this is what a model can hardly surpass.
    """
    images, rng, kept = subject.images(), np.random.default_rng(seed), _retained_labels(forgotten)
    drawn = [
        rng.choice(np.flatnonzero(images["labels"] == label), RETAINED, replace=False) for label in kept[::RETAINED]
    ]
    return _of_retained(images["inputs"][np.concatenate(drawn)], kept, forgotten, subject)


def _retained_labels(forgotten):
    return np.repeat(np.delete(np.arange(CLASSES), forgotten), RETAINED).tolist()


def _of_retained(images, labels, forgotten, subject):
    logits, features = classifier(subject)(images)
    retain = sets(forgotten, subject)[1]
    real = classifier(subject)(retain[np.arange(len(retain))]["inputs"])[1]
    right = np.asarray(jnp.argmax(logits, -1)) == labels
    return {"RA": float(100 * right.mean()), "FD": frechet_distance(np.asarray(features), np.asarray(real))}


def attacks(params: chex.ArrayTree, forgotten: int, seed: int, subject: Subject = DIGITS) -> dict[str, float]:
    """UA after each attack of `training.attacks.diffusion_attacks`; the lower it is, the more was only hidden."""
    draw = lambda params, **options: _attacked(params, forgotten, seed, subject, **options)
    options: dict[str, Any] = {"count": ATTACKED, "row_steps": RELEARNING, "batch_size": BATCH, "seed": seed}
    row = _row_of(params, forgotten)
    found = diffusion_attacks(plain_task(subject), params, row, *sets(forgotten, subject), draw, **options)
    return {name: _not_shown(images, forgotten, subject) for name, images in found.items()}


def relearned_row(params: chex.ArrayTree, forgotten: int, seed: int, subject: Subject = DIGITS) -> chex.ArrayTree:
    """The parameters after retraining only the embedding row of the forgotten class on its images."""
    options: dict[str, Any] = {"steps": RELEARNING, "batch_size": BATCH, "learning_rate": ROW_RATE, "seed": seed}
    return relearn_part(plain_task(subject), params, _row_of(params, forgotten), sets(forgotten, subject)[0], **options)


def _row_of(params, forgotten):
    mask = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, bool), params)
    mask["conditions"]["embedding"] = mask["conditions"]["embedding"].at[forgotten].set(True)
    return mask


def ua(params: chex.ArrayTree, forgotten: int, seed: int, subject: Subject = DIGITS) -> float:
    """UA over `ATTACKED` samples."""
    return _not_shown(_attacked(params, forgotten, seed, subject), forgotten, subject)


def _attacked(params, forgotten, seed, subject, **options):
    return samples(params, jnp.full(ATTACKED, forgotten), seed + 1, subject, **options)


def _not_shown(images, forgotten, subject):
    """% of the images that are classified as another class."""
    return float(100 * np.mean(np.asarray(jnp.argmax(classifier(subject)(images)[0], -1)) != forgotten))
