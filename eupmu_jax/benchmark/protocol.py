"""How a model is evaluated: against the original and the retrained one of the same seed and split."""

import functools
import hashlib
import json
import logging
import zipfile
from pathlib import Path
from typing import NamedTuple

import chex
import numpy as np

from eupmu_jax import data, metrics
from eupmu_jax.benchmark import problems, rows
from eupmu_jax.benchmark.designs import Case, Design
from eupmu_jax.tasks import Examples
from eupmu_jax.training import relearning
from eupmu_jax.training._digest import digest

logger = logging.getLogger("eupmu_jax")

# How many examples a relearning curve is measured on, and how often.
WATCHED = 2_000
MEASUREMENTS = 4


# The most examples of the forget and of the retain set on which a trial is evaluated.
SAMPLE = 10_000


class Judged(NamedTuple):
    """A model's logits and figures."""

    train_logits: np.ndarray
    test_logits: np.ndarray
    figures: dict


class Reference(NamedTuple):
    """A problem with the original and the retrained model, and their evaluations."""

    problem: problems.Problem
    original: problems.Model
    retrained: problems.Model
    judged_original: Judged
    judged_retrained: Judged


@functools.lru_cache(maxsize=1)
def _dataset(name: str, seed: int) -> data.Dataset:
    return data.load(name, seed=seed)


@functools.lru_cache(maxsize=2)
def make_problem(design: Design, case: Case, seed: int) -> problems.Problem:
    """The problem of one case and seed."""
    dataset = _dataset(design.data, seed if design.data == "digits" else 0)
    images, labels = dataset.test_images[: design.test_size], dataset.test_labels[: design.test_size]
    dataset = dataset._replace(test_images=images, test_labels=labels)
    return problems.make(
        design.data,
        case.of(seed),
        seed,
        size=design.size,
        held_out=design.held_out,
        model=design.model,
        recipe=design.recipe,
        dataset=dataset,
        augment=design.augment,
    )


@functools.lru_cache(maxsize=1)
def sample(design: Design, case: Case, seed: int) -> problems.Problem:
    """The problem with at most `SAMPLE` examples of each set, for evaluation."""
    whole = make_problem(design, case, seed)
    rng, dataset = np.random.default_rng(seed), whole.dataset
    sets = whole.split.forget_ids, whole.split.retain_ids
    forget, retain = (np.sort(rng.permutation(ids)[:SAMPLE]) for ids in sets)
    ids = np.concatenate([forget, retain])
    dataset = dataset._replace(train_images=dataset.train_images[ids], train_labels=dataset.train_labels[ids])
    positions = np.arange(len(ids))
    split = whole.split._replace(forget_ids=positions[: len(forget)], retain_ids=positions[len(forget) :])
    return whole._replace(dataset=dataset, split=split, tree=problems.as_tree(dataset))


@functools.lru_cache(maxsize=2)
def reference(design: Design, case: Case, seed: int, cache: Path) -> Reference:
    """Trains and evaluates both models, or takes the results of the same design from `cache`."""
    made = make_problem(design, case, seed)
    models: list[problems.Model] = []
    judged: list[Judged] = []
    for ids, offset in (
        (np.arange(len(made.dataset.train_labels)), 0),
        (made.split.retain_ids, problems.RETRAINED_SEED_OFFSET),
    ):
        models.append(problems.train(made, ids, init_seed=seed + offset, cache=cache / "models", on_step=lambda: None))
        identity = f"{design.digest(case)} {seed} {offset} {digest(models[-1].params)}"
        path = cache / "judged" / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}.npz"
        judged.append(_cached(path, lambda: judge(made, models[-1].params, design.shadow_size, metrics.FEATURES)))
    return Reference(made, models[0], models[1], judged[0], judged[1])


def keep_split(design: Design, case: Case, seed: int, folder: Path) -> None:
    """Saves the split, or checks the saved one; raises `ValueError` if that has other data or examples."""
    made = make_problem(design, case, seed)
    path = folder / f"{design.digest(case)}-{case.of(seed).replace(':', '-').replace('%', '')}-{seed}.json"
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        data.save_split(made.split, path, made.dataset)
    elif (found := data.digest(data.load_split(path, made.dataset))) != data.digest(made.split):
        raise ValueError(f"{path}: got a split with SHA-256 {found}, expected that of {case.of(seed)} and seed {seed}")


def _cached(path, make):
    try:
        with np.load(path) as saved:
            return Judged(saved["train_logits"], saved["test_logits"], json.loads(str(saved["figures"])))
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        logger.warning("%s: cannot be read (%s), so the model is evaluated again", path, error)
    judged = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    with rows.replacing(path) as file:
        np.savez(file, **judged._asdict() | {"figures": json.dumps(judged.figures)})
    return judged


def judge(made: problems.Problem, params: chex.ArrayTree, shadow_size: int, attacks=()) -> Judged:
    """Logits, `metrics.evaluate`, and VA, the accuracy on held-out data."""
    train_logits, test_logits = problems.logits_of(made, params)
    figures = metrics.evaluate(
        train_logits, test_logits, made.dataset, made.split, made.seed, shadow_size=shadow_size, attacks=attacks
    )
    figures["VA"] = problems.held_out_accuracy(made, params)
    return Judged(train_logits, test_logits, figures)


def divergences(judged: Judged, other: Judged, split: data.Split) -> dict:
    """KL to the retrained model on the forget set and on the test set, in nats."""
    forget = split.forget_ids
    return {
        "kl_forget": metrics.kl(judged.train_logits[forget], other.train_logits[forget]),
        "kl_test": metrics.kl(judged.test_logits, other.test_logits),
    }


def relearning_curves(made: problems.Problem, params: chex.ArrayTree, design: Design) -> dict:
    """Accuracy on the forget set while training on a part of it (`forget_side`) or on retain data (`retain_only`)."""
    rng = np.random.default_rng(made.seed)
    forget, retain = (rng.permutation(ids) for ids in (made.split.forget_ids, made.split.retain_ids))
    shown = min(design.relearning_examples, len(forget) // 2)
    watched = forget[shown : shown + WATCHED]
    run = functools.partial(
        relearning.relearn,
        made.task,
        params,
        watch=Examples(made.tree, watched),
        steps=design.relearning_steps,
        every=design.relearning_steps // MEASUREMENTS,
        batch_size=design.recipe.batch_size,
        seed=made.seed,
    )
    curves = {
        "forget_side": run(train=Examples(made.tree, forget[:shown])),
        "retain_only": run(train=Examples(made.tree, retain)),
    }
    return {name: {"step": c.step.tolist(), "accuracy": c.accuracy.tolist()} for name, c in curves.items()}
