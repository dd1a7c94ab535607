"""Shadow models on halves of a set of examples: problems, settings, and one unlearning run."""

import functools
from pathlib import Path
from typing import NamedTuple

import chex
import jax.numpy as jnp
import numpy as np

from eupmu_jax import data, metrics
from eupmu_jax.benchmark import problems
from eupmu_jax.benchmark.problems import RETRAINED_SEED_OFFSET
from eupmu_jax.methods import METHODS, Choice, default_settings
from eupmu_jax.methods.passes import affordable_steps
from eupmu_jax.tasks import as_examples
from eupmu_jax.training import fitting
from eupmu_jax.training.unlearning import Unlearned, unlearn

POOL_SEED, TUNING_SEED = 0, 100


class Variant(NamedTuple):
    """A method, and a forget objective if the method takes one."""

    method: str
    objective: str | None = None


VARIANTS = (
    Variant("fine-tuning"),
    Variant("SCRUB"),
    Variant("random labels"),
    *(
        Variant(method, objective)
        for method in ("weighted sum", "EUPMU explicit", "EUPMU budget")
        for objective in ("bounded_ascent", "random_labels")
    ),
    Variant("EUPMU"),
)


def is_untuned(variant: Variant) -> bool:
    """Whether the method finds by itself how far to forget, and has its defaults instead of trials."""
    return METHODS[variant.method].steers


class Setup(NamedTuple):
    """Sizes of the experiment.

    Attributes:
      data, model, size, recipe: See `problems.make`; a shadow model is trained on half of `size` examples.
      tested: Maximum number of test examples.
      held_out: Maximum number of further test examples, for methods that measure the error on unseen data.
      pairs: Pairs of shadow models on complementary halves.
      forget: The share of targets among all examples, and of each half that is forgotten.
      steps, batches: Steps and batch sizes of every unlearning run.
      variants, trials: What is compared, and the trials of each.
      seeds: Seeds of the models that forget memorised examples.
    """

    data: str = "fashion_mnist"
    model: str = "narrow-cnn"
    size: int = 2_000
    recipe: problems.Recipe = problems.Recipe(40, 64, 2e-3)
    tested: int = 2_000
    held_out: int = 2_000
    pairs: int = 16
    forget: str = "10%"
    steps: int = 40
    batches: tuple[int, int] = (32, 96)
    variants: tuple[Variant, ...] = VARIANTS
    trials: int = 8
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)


@functools.cache
def make_problem(design: Setup, size: int, seed: int) -> problems.Problem:
    """A problem of `size` examples with a random forget set."""
    forget = f"random:{design.forget}"
    made = problems.make(design.data, forget, seed, size=size, model=design.model, recipe=design.recipe)
    images, labels = made.dataset.test_images, made.dataset.test_labels
    dataset = made.dataset._replace(test_images=images[: design.tested], test_labels=labels[: design.tested])
    unseen = slice(design.tested, design.tested + design.held_out)
    held_out = as_examples("held_out", {"inputs": jnp.asarray(images[unseen]), "labels": jnp.asarray(labels[unseen])})
    return made._replace(dataset=dataset, held_out=held_out)


def pool(design: Setup) -> problems.Problem:
    """The problem with all examples of the shadow models; its forget set are the targets."""
    return make_problem(design, design.size, POOL_SEED)


def halves(split: data.Split, pair: int) -> tuple[np.ndarray, np.ndarray]:
    """The ids of two complementary halves, each with half of the targets, so that all problems have the same size."""
    rng = np.random.default_rng(pair)
    parts = [np.array_split(rng.permutation(ids), 2) for ids in (split.forget_ids, split.retain_ids)]
    first, second = (np.sort(np.concatenate(part)) for part in zip(*parts, strict=True))
    return first, second


def half(design: Setup, shadow: int) -> np.ndarray:
    """The ids of the examples of one shadow model."""
    return halves(pool(design).split, shadow // 2)[shadow % 2]


class Shadow(NamedTuple):
    """A model of one half, and the model retrained without the forget set."""

    problem: problems.Problem
    original: problems.Model
    retrained: problems.Model


def shadow_of(design: Setup, shadow: int, forgotten: tuple[int, ...], cache: Path) -> Shadow:
    """The shadow model of a half whose forget set is `forgotten`."""
    ids, forget = half(design, shadow), np.array(forgotten)
    retain = np.setdiff1d(ids, forget)
    made = pool(design)._replace(split=data.Split(forget, retain, None))
    train = functools.partial(problems.train, made, cache=cache, on_step=lambda: None)
    return Shadow(made, train(ids, init_seed=shadow), train(retain, init_seed=shadow + RETRAINED_SEED_OFFSET))


@functools.cache
def shadows(design: Setup, cache: Path) -> list[Shadow]:
    """All shadow models; the forget set of each are the targets of its half."""
    targets = pool(design).split.forget_ids
    mine = [np.intersect1d(half(design, shadow), targets) for shadow in range(2 * design.pairs)]
    return [shadow_of(design, shadow, tuple(forget.tolist()), cache) for shadow, forget in enumerate(mine)]


def draw(variant: Variant, trial: int) -> dict:
    """Random settings from the method's space; the same numbers for every objective."""
    rng, settings = np.random.default_rng([trial, *variant.method.encode()]), {}
    for name, dimension in METHODS[variant.method].space.items():
        if isinstance(dimension, Choice):
            settings[name] = dimension.options[rng.integers(len(dimension.options))]
        else:
            settings[name] = float(np.exp(rng.uniform(*np.log(dimension))))
    return settings | ({"forget_objective": variant.objective} if variant.objective else {})


def unlearned(
    design: Setup, made: problems.Problem, params: chex.ArrayTree, variant: Variant, settings, seed
) -> Unlearned:
    """One run of a method, with as many steps as fit the pass budget."""
    held_out = made.held_out if is_untuned(variant) else None
    counts, unseen = (len(made.forget), len(made.retain)), 0 if held_out is None else len(held_out)
    if held_out is None:
        settings = settings | {"optimizer": "adam"}
    else:
        settings = default_settings(METHODS[variant.method], made.task)
    steps = affordable_steps(variant.method, settings, made.task, counts, design.steps, design.batches, unseen)
    return unlearn(
        variant.method,
        made.task,
        params,
        made.forget,
        made.retain,
        held_out,
        steps=steps,
        settings=settings,
        seed=seed,
        forget_batch=design.batches[0],
        retain_batch=design.batches[1],
        probes=0,
    )


def judge(made: problems.Problem, params: chex.ArrayTree, seed: int) -> tuple[np.ndarray, dict]:
    """Logits of all examples of the pool, and the figures on the split of the problem."""
    logits, tested = problems.logits_of(made, params)
    return logits, metrics.evaluate(logits, tested, made.dataset, made.split, seed, attacks=())


@functools.cache
def memorisation(design: Setup, cache: Path) -> np.ndarray:
    """The memorisation score of every example of the pool."""
    made, ids = pool(design), np.arange(design.size)
    members = np.array([np.isin(ids, half(design, shadow)) for shadow in range(2 * design.pairs)])
    apply, images = made.functions.apply, made.tree["inputs"]
    logits = (fitting.predict(apply, model.original.params, images) for model in shadows(design, cache))
    return metrics.memorisation_scores([metrics.confidence(one, made.dataset.train_labels) for one in logits], members)
