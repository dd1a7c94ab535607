"""A diffusion model of digits that is to forget a class: its training, what judges it, and what attacks it.

The model is a DiT of 0.3 million parameters on the 8 x 8 digits of scikit-learn, predicting v; what is unlearned and
sampled is the moving average of its training. The judge is a classifier that has seen real digits alone.
"""

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from eupmu_jax import tasks
from eupmu_jax.metrics.frechet import frechet_distance
from eupmu_jax.models import MLP
from eupmu_jax.models.dit import DiT
from eupmu_jax.models.sampling import sample
from eupmu_jax.objectives.diffusion import cosine_schedule
from eupmu_jax.tasks import Examples, Task
from eupmu_jax.training import checkpoints
from eupmu_jax.training.attacks import ROW_RATE, diffusion_attacks
from eupmu_jax.training.fitting import fit
from eupmu_jax.training.relearning import relearn_part

CLASSES, SHAPE, SCHEDULE = 10, (8, 8, 1), cosine_schedule(1_000)
EPOCHS, BATCH, LEARNING_RATE, AVERAGE = 100, 64, 2e-3, 0.995
# Samples of the forgotten class, and of each other one; and of the forgotten class after an attack.
FORGOTTEN, RETAINED, ATTACKED = 256, 32, 128
# Steps in which the row of the embedding is trained again.
RELEARNING = 200


class Model(NamedTuple):
    """A trained model, and what it cost."""

    params: chex.ArrayTree
    seconds: float
    processor_seconds: float


@functools.cache
def digits() -> dict[str, np.ndarray]:
    """All 1,797 digits, with pixels in [-1, 1], and their labels."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return {"inputs": (pixels / 8 - 1).astype(np.float32).reshape(-1, *SHAPE), "labels": labels.astype(np.int32)}


def sets(forgotten: int) -> tuple[Examples, Examples]:
    """The images of a class, and all others."""
    labels = digits()["labels"]
    forget, retain = (Examples(digits(), np.flatnonzero(part)) for part in (labels == forgotten, labels != forgotten))
    return forget, retain


@functools.cache
def functions() -> tuple[Callable, Callable]:
    """The network as a function of its parameters, and its fresh parameters as one of a key."""
    graph, _ = nnx.split(DiT(CLASSES, rngs=nnx.Rngs(0)), nnx.Param)
    fresh = lambda key: nnx.to_pure_dict(nnx.state(DiT(CLASSES, rngs=nnx.Rngs(key)), nnx.Param))
    return lambda params, x_t, t, labels: nnx.merge(graph, params)(x_t, t, labels), fresh


def task(original: chex.ArrayTree | None = None) -> Task:
    """The task, whose targets are those of the original model where there is one."""
    denoise, fresh = functions()
    return tasks.diffusion(denoise, SCHEDULE, num_conditions=CLASSES, original=original, fresh_params=fresh)


@functools.cache
def plain_task() -> Task:
    """The task without an original model, one object for all who measure."""
    return task()


def steps_of(ids: np.ndarray, epochs: int = EPOCHS) -> int:
    """Optimizer steps that `train` makes on these examples."""
    return epochs * (len(ids) // BATCH)


def train(
    ids: np.ndarray, seed: int, cache: Path, epochs: int = EPOCHS, on_step: Callable[[], None] = lambda: None
) -> Model:
    """Trains on these digits alone, or returns the checkpoint in `cache` of the same training."""
    made = plain_task()
    params = made.fresh_params(jax.random.key(seed))  # type: ignore[misc]
    recipe: dict[str, Any] = {"epochs": epochs, "batch_size": BATCH, "learning_rate": LEARNING_RATE, "average": AVERAGE}
    chosen = hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()
    meta = {"data": "digits", "model": "dit", "ids": chosen, "seed": seed, "recipe": recipe, "jax": jax.__version__}

    def make():
        fitted = fit(_denoising, params, {}, Examples(digits(), ids), seed=seed, on_step=on_step, **recipe)
        return fitted.params, {"seconds": fitted.seconds.wall, "processor_seconds": fitted.seconds.processor}

    found, saved = checkpoints.cached(cache, params, meta, make)
    return Model(found, saved["seconds"], saved["processor_seconds"])


def _denoising(params, statistics, batch, key):
    return plain_task().retain(plain_task().outputs(params, batch, key), batch), statistics


@functools.cache
def classifier() -> Callable:
    """`images -> (logits, features)`, by a network that has seen real digits alone."""
    graph, params = nnx.split(MLP((64, 128, 64, CLASSES), nnx.Rngs(0)), nnx.Param)
    made = tasks.classification(lambda params, x: nnx.merge(graph, params)(x), CLASSES)
    loss = lambda params, statistics, batch, key: (made.retain(made.outputs(params, batch, key), batch), statistics)
    everything = Examples(digits(), np.arange(len(digits()["labels"])))
    options: dict[str, Any] = {"epochs": 60, "batch_size": BATCH, "learning_rate": 1e-3, "seed": 0}
    fitted = nnx.merge(graph, fit(loss, nnx.to_pure_dict(params), {}, everything, **options).params)

    @jax.jit
    def both(images):
        hidden = images.reshape(len(images), -1)
        for layer in fitted.layers[:-1]:
            hidden = nnx.relu(layer(hidden))
        return fitted.layers[-1](hidden), hidden

    return both


def samples(params: chex.ArrayTree, labels: chex.Array, seed: int, **options) -> chex.Array:
    """Images for these classes, by 50 DDIM steps under guidance 2 unless options of `sample` say otherwise."""
    key = jax.random.key(seed)
    return sample(functions()[0], params, SCHEDULE, labels, SHAPE, key, nothing=CLASSES, **options)


def judge(params: chex.ArrayTree, forgotten: int, seed: int) -> dict[str, float]:
    """Figures of a model's samples; with one seed every model's come from the same noise.

    Returns:
      UA, % of the samples for the forgotten class that are taken for another; RA, % of those for the other classes that
      are taken for what was asked for; FD, the Frechet distance of the classifier's features of the latter to those of
      the real images of these classes.
    """
    others = np.delete(np.arange(CLASSES), forgotten)
    labels = jnp.asarray(np.concatenate([np.full(FORGOTTEN, forgotten), np.repeat(others, RETAINED)]))
    logits, features = classifier()(samples(params, labels, seed))
    right = np.asarray(jnp.argmax(logits, -1) == labels)
    real = np.asarray(classifier()(sets(forgotten)[1][np.arange(len(sets(forgotten)[1]))]["inputs"])[1])
    distance = frechet_distance(np.asarray(features)[FORGOTTEN:], real)
    ua, ra = 100 * (1 - right[:FORGOTTEN].mean()), 100 * right[FORGOTTEN:].mean()
    return {"UA": float(ua), "RA": float(ra), "FD": distance}


def attacks(params: chex.ArrayTree, forgotten: int, seed: int) -> dict[str, float]:
    """UA after each attack of `training.attacks.diffusion_attacks`; the less, the more was only hidden."""
    forget, retain = sets(forgotten)
    draw = lambda params, **options: _attacked(params, forgotten, seed, **options)
    options: dict[str, Any] = {"count": ATTACKED, "row_steps": RELEARNING, "batch_size": BATCH, "seed": seed}
    found = diffusion_attacks(plain_task(), params, _row_of(params, forgotten), forget, retain, draw, **options)
    return {name: _not_shown(images, forgotten) for name, images in found.items()}


def relearned_row(params: chex.ArrayTree, forgotten: int, seed: int) -> chex.ArrayTree:
    """Parameters whose row of the forgotten class alone is trained again on its images."""
    options: dict[str, Any] = {"steps": RELEARNING, "batch_size": BATCH, "learning_rate": ROW_RATE, "seed": seed}
    return relearn_part(plain_task(), params, _row_of(params, forgotten), sets(forgotten)[0], **options)


def _row_of(params, forgotten):
    mask = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, bool), params)
    mask["conditions"]["embedding"] = mask["conditions"]["embedding"].at[forgotten].set(True)
    return mask


def ua(params: chex.ArrayTree, forgotten: int, seed: int) -> float:
    """UA of `ATTACKED` samples."""
    return _not_shown(_attacked(params, forgotten, seed), forgotten)


def _attacked(params, forgotten, seed, **options):
    return samples(params, jnp.full(ATTACKED, forgotten), seed + 1, **options)


def _not_shown(images, forgotten):
    """% of the images that are taken for another class."""
    return float(100 * np.mean(np.asarray(jnp.argmax(classifier()(images)[0], -1)) != forgotten))
