"""Emoji and the words of their names, a diffusion model that draws them, and a classifier for its samples."""

import collections
import functools
import hashlib
import re
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from eupmu_jax import tasks
from eupmu_jax.data import augment, emoji
from eupmu_jax.models import SmallCNN
from eupmu_jax.models.sampling import sample
from eupmu_jax.models.unet import UNet
from eupmu_jax.objectives.diffusion import cosine_schedule
from eupmu_jax.tasks import Examples
from eupmu_jax.training import checkpoints
from eupmu_jax.training.fitting import fit, fit_task

# An emoji's concept is the first of these words in its name.
CONCEPTS = ("flag", "clock", "moon", "face", "heart", "arrow", "hand")
# Words in fewer names are left out of the prompts.
OFTEN = 5
SHAPE, SCHEDULE = (32, 32, 3), cosine_schedule(1_000)
SIZES = {"in_channels": 3, "patch_size": 2, "widths": [32, 64], "blocks": 1}
EPOCHS, BATCH, LEARNING_RATE, AVERAGE = 250, 64, 2e-3, 0.995
# Of negative guidance, the forget loss: with less, its minimum is below the loss of a retrained model.
GUIDANCE = 5.0
# Evaluated samples for each concept.
JUDGED = 32


class Emoji(NamedTuple):
    """All emoji of the concepts.

    Attributes:
      tree: `inputs` `(n, 32, 32, 3)` in [-1, 1], and `labels`, the indices of their prompts.
      concepts: `(n,)`, indices into `CONCEPTS`.
      tested: `(n,)`, whether the classifier is tested on it and not trained.
      words: All words of the prompts.
      prompts: `(prompts + 1, words)`, each word's share of a prompt; the last has no words.
    """

    tree: dict[str, np.ndarray]
    concepts: np.ndarray
    tested: np.ndarray
    words: list[str]
    prompts: np.ndarray


@functools.cache
def data() -> Emoji:
    """The emoji. The prompt of a flag is "flag" alone, as each country occurs once; other prompts are common words."""
    sides = emoji.named(None)
    images, names = np.concatenate([sides[side][0] for side in sides]), [n for side in sides for n in sides[side][1]]
    tested = np.arange(len(names)) >= len(sides["train"][1])
    bags = [set(re.findall("[a-z]+", name.lower())) for name in names]
    kept = [k for k, bag in enumerate(bags) if bag & set(CONCEPTS)]
    concepts = np.array([next(i for i, word in enumerate(CONCEPTS) if word in bags[k]) for k in kept])
    bags = [{"flag"} if concept == 0 else bags[k] for k, concept in zip(kept, concepts, strict=True)]
    counts = collections.Counter(word for bag in bags for word in bag)
    words = sorted(word for word in counts if counts[word] >= OFTEN)
    table = np.array([[word in bag for word in words] for bag in bags], np.float32)
    prompts, labels = np.unique(table / table.sum(1, keepdims=True), axis=0, return_inverse=True)
    tree = {"inputs": (2 * images[kept] - 1).astype(np.float32), "labels": labels.ravel().astype(np.int32)}
    return Emoji(tree, concepts, tested[kept], words, np.vstack([prompts, np.zeros(len(words))]).astype(np.float32))


def sets() -> tuple[Examples, Examples]:
    """The flags, and all other emoji."""
    flags = data().concepts == 0
    return Examples(data().tree, np.flatnonzero(flags)), Examples(data().tree, np.flatnonzero(~flags))


class Words(nnx.Module):
    """Embeds prompts `(n, words)`, the share of each word, as the mean of their words' embeddings."""

    def __init__(self, words: int, width: int, *, rngs: nnx.Rngs):
        self.embedding = nnx.Param(nnx.initializers.normal(0.1)(rngs.params(), (words, width)))

    def __call__(self, prompts: jax.Array) -> jax.Array:
        """Maps to `(n, width)`."""
        return prompts @ self.embedding[...]


@functools.cache
def functions():
    """The network as a function of parameters and prompt indices, and a function from a key to fresh parameters."""

    def make(seed):
        rngs = nnx.Rngs(seed)
        model = UNet(1, **SIZES, rngs=rngs)
        model.conditions = Words(len(data().words), model.conditions.features, rngs=rngs)
        return model

    graph, _ = nnx.split(make(0), nnx.Param)
    prompts = jnp.asarray(data().prompts)
    denoise = lambda params, x_t, t, labels: nnx.merge(graph, params)(x_t, t, prompts[labels])
    return denoise, lambda key: nnx.to_pure_dict(nnx.state(make(key), nnx.Param))


@functools.cache
def nothing() -> int:
    """The index of the prompt without words."""
    return len(data().prompts) - 1


def task(original=None) -> tasks.Task:
    """The task; its targets come from the original model if one is given."""
    denoise, fresh = functions()
    options = {"num_conditions": nothing(), "guidance": GUIDANCE, "original": original, "fresh_params": fresh}
    return tasks.diffusion(denoise, SCHEDULE, **options)


@functools.cache
def plain_task() -> tasks.Task:
    """The task without an original model, cached as one object."""
    return task()


def train(ids: np.ndarray, seed: int, cache: Path, epochs: int = EPOCHS):
    """Parameters trained on these emoji alone, and the CPU time; loaded from `cache` if the same training is there."""
    params = plain_task().fresh_params(jax.random.key(seed))
    recipe = {"epochs": epochs, "batch_size": BATCH, "learning_rate": LEARNING_RATE, "average": AVERAGE}
    chosen = hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()
    meta = {"data": "emoji", "sizes": SIZES, "ids": chosen, "seed": seed, "recipe": recipe, "jax": jax.__version__}

    def make():
        fitted = fit_task(plain_task(), params, Examples(data().tree, ids), seed=seed, **recipe)
        return fitted.params, {"processor_seconds": fitted.seconds.processor}

    found, saved = checkpoints.cached(cache, params, meta, make)
    return found, saved["processor_seconds"]


@functools.cache
def classifier():
    """A function from images to concepts, and its accuracy in % on the real emoji that it was not trained on."""
    graph, params = nnx.split(SmallCNN(len(CONCEPTS), in_channels=3, image_size=32, rngs=nnx.Rngs(0)), nnx.Param)
    apply = lambda params, images: nnx.merge(graph, params)(images)
    judge = tasks.classification(apply, len(CONCEPTS))

    def loss(params, statistics, batch, key):
        # The augmentation pads with zeros, whereas the background of the emoji is white, which is 1.
        moved = 1 - augment(key, 1 - batch["inputs"], padding=3)
        batch = batch | {"inputs": moved}
        return judge.retain(judge.outputs(params, batch, key), batch), statistics

    tree = data().tree | {"labels": data().concepts.astype(np.int32)}
    seen = Examples(tree, np.flatnonzero(~data().tested))
    options = {"epochs": 120, "batch_size": BATCH, "learning_rate": 1e-3, "seed": 0}
    fitted = fit(loss, nnx.to_pure_dict(params), {}, seen, **options).params
    names = jax.jit(lambda images: jnp.argmax(apply(fitted, images), -1))
    right = np.asarray(names(tree["inputs"][data().tested])) == data().concepts[data().tested]
    return names, 100 * right.mean()


def samples(params, labels, seed: int):
    """Images for these prompts, sampled by 50 DDIM steps with guidance 2."""
    return sample(functions()[0], params, SCHEDULE, jnp.asarray(labels), SHAPE, jax.random.key(seed), nothing=nothing())


def prompts_of(concept: int, count: int) -> np.ndarray:
    """`count` prompts of real emoji of the concept, repeated in turn."""
    return np.resize(data().tree["labels"][data().concepts == concept], count)


def judge(params, seed: int) -> dict[str, float]:
    """The share, in %, of the samples for each concept that show it; the noise depends on the seed alone."""
    labels = np.concatenate([prompts_of(k, JUDGED) for k in range(len(CONCEPTS))])
    shown = np.asarray(classifier()[0](samples(params, labels, seed))).reshape(len(CONCEPTS), JUDGED)
    return {word: float(100 * np.mean(shown[k] == k)) for k, word in enumerate(CONCEPTS)}
