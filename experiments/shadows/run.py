"""Per-example membership with shadow models: U-LiRA on unlearned models, and forget sets of memorised examples.

Command:  uv run python experiments/shadows/run.py
Time:     about 16 minutes on one core; finished rows are not repeated.
Result:   experiments/shadows/rows.jsonl, a row for each trial, each method's attack and each evaluated model.

2,000 images of Fashion-MNIST are split into random halves 16 times, and a small CNN is trained on each of the 32. A
random tenth of the images are *targets*, half of them in each half. There are two tests of a method:

1. U-LiRA. Every shadow model unlearns the targets of its half. A target's phi under the 16 models that learned and
   unlearned it is compared with phi under 16 models that never saw it, retrained on the other halves without their
   targets. For the *control*, the first 16 models are retrained in the same way: no difference should be found.
2. Hard forget sets. The 32 models give each image a memorisation score. Models of further halves, one for each seed,
   unlearn a tenth of their images, either random ones or those with the highest scores, and are compared with the
   model retrained without them.

A method's settings are those of the best of 8 random trials by the blind score of the classification benchmark, on one
problem with newly drawn images and a random forget set, and with the accuracy on further test images. Both parts use
them: the tuning sees no shadow models, memorised examples or reported test images. EUPMU, which finds by itself how far
to forget, has no trials: it measures the error on those further images instead. A method that takes a forget objective
is tuned with each of two, on the same random numbers. All use Adam; the pass budget of a run is that of 40 steps of
32 + 96 examples, with a backward pass counted as two forward passes.
"""

import argparse
import functools
from pathlib import Path

import chex
import jax
import numpy as np

from eupmu_jax import data, metrics
from eupmu_jax.benchmark import problems, rows, tuning
from eupmu_jax.methods import METHODS
from eupmu_jax.training import fitting
from experiments import origin
from experiments.shadows.models import (
    POOL_SEED,
    TUNING_SEED,
    Setup,
    Shadow,
    Variant,
    draw,
    half,
    is_untuned,
    judge,
    make_problem,
    memorisation,
    pool,
    shadow_of,
    shadows,
    unlearned,
)

ROWS = Path(__file__).with_name("rows.jsonl")
# What is attacked besides unlearned models, and the model of a `Shadow` that it is.
REFERENCES = {"original": "original", "control": "retrained"}


@functools.cache
def tuning_problem(design: Setup, cache: Path) -> tuple[problems.Problem, chex.ArrayTree, dict]:
    """The problem that methods are tuned on, its original model, and the figures of that model."""
    made = make_problem(design, design.size // 2, TUNING_SEED)
    ids = np.arange(len(made.dataset.train_labels))
    params = problems.train(made, ids, init_seed=TUNING_SEED, cache=cache, on_step=lambda: None).params
    return made, params, figures_of(made, params)


def figures_of(made: problems.Problem, params: chex.ArrayTree) -> dict:
    """Figures for the tuning, with VA, the accuracy on examples that are not reported."""
    return judge(made, params, TUNING_SEED)[1] | {"VA": problems.held_out_accuracy(made, params)}


def try_out(design: Setup, variant: Variant, trial: int, cache: Path) -> dict:
    """The fields of a trial's row."""
    made, original, before = tuning_problem(design, cache)
    settings = draw(variant, trial)
    figures = figures_of(made, unlearned(design, made, original, variant, settings, TUNING_SEED).params)
    blind = tuning.blind_score(figures, before)
    finite = np.isfinite([blind, figures["retain_loss"]]).all()
    return figures | {"settings": settings, "blind": blind if finite else tuning.DIVERGED}


def worlds(phi: np.ndarray, never: np.ndarray, members: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each pair of shadow models, phi under the one that had the example, and `never` under the other.

    All are `(2 P, N)`, the models of a pair side by side; the results are `(P, N)`.
    """
    first = members[::2]
    return np.where(first, phi[::2], phi[1::2]), np.where(first, never[1::2], never[::2])


def phi(design: Setup, logits: np.ndarray) -> np.ndarray:
    """The statistic of every target."""
    targets, labels = pool(design).split.forget_ids, pool(design).dataset.train_labels
    return metrics.lira_statistic(logits[targets], labels[targets])


@functools.cache
def phi_never(design: Setup, cache: Path) -> np.ndarray:
    """The statistic under the models that saw no target."""
    made = pool(design)
    return np.array(
        [
            phi(design, fitting.predict(made.functions.apply, m.retrained.params, made.tree["inputs"]))
            for m in shadows(design, cache)
        ]
    )


def attack(design: Setup, cache: Path, params: list[chex.ArrayTree]) -> dict:
    """U-LiRA on the models `params`, one for each shadow model, and their figures.

    `AUC_hardest` is that of the tenth of the targets with the highest memorisation scores.
    """
    models, targets = shadows(design, cache), pool(design).split.forget_ids
    judged = [judge(model.problem, one, seed) for seed, (model, one) in enumerate(zip(models, params, strict=True))]
    members = np.array([np.isin(targets, model.problem.split.forget_ids) for model in models])
    statistics = np.array([phi(design, logits) for logits, _ in judged])
    unlearned, out = worlds(statistics, phi_never(design, cache), members)
    scores, truth = metrics.leave_pair_out(unlearned, out, pooled_variance=True)
    hardest = np.argsort(-memorisation(design, cache)[targets], stable=True)[: len(targets) // 10]
    return {
        **metrics.attack_figures(scores, truth),
        "AUC_hardest": metrics.attack_figures(scores[..., hardest], truth[..., hardest])["AUC"],
        "AUC_of_pairs": [metrics.attack_figures(scores[:, p], truth[:, p])["AUC"] for p in range(design.pairs)],
        "shift": float(np.mean(unlearned - out)),
        "targets": len(targets),
        "shadows": len(models),
        **{name: float(np.mean([figures[name] for _, figures in judged])) for name in ("UA", "RA", "TA")},
    }


@functools.cache
def forget_set(design: Setup, kind: str, seed: int, cache: Path) -> tuple[Shadow, dict]:
    """A forget set from a further half, random or by memorisation, and the retrained model's figures."""
    shadow, dataset = 2 * (design.pairs + seed), pool(design).dataset
    ids, name = half(design, shadow), f"{kind}:{design.forget}"
    labels, scores = dataset.train_labels[ids], memorisation(design, cache)[ids]
    split = data.split(labels, name, num_classes=dataset.num_classes, seed=seed, scores=scores)
    found = shadow_of(design, shadow, tuple(ids[split.forget_ids].tolist()), cache)
    return found, judge(found.problem, found.retrained.params, seed)[1]


def compare(design: Setup, cache: Path, kind: str, variant: Variant, settings: dict | None, seed: int) -> dict:
    """Figures of one model and their gap to the retrained model's."""
    found, retrained = forget_set(design, kind, seed, cache)
    row: dict = {"settings": settings, "split": data.digest(found.problem.split)}
    if settings is None:
        params = getattr(found, variant.method).params
    else:
        made = unlearned(design, found.problem, found.original.params, variant, settings, seed)
        params, passes = made.params, made.forward + 2 * made.backward
        row["passes_of_retraining"] = 100 * passes / (3 * found.retrained.examples)
    figures = judge(found.problem, params, seed)[1]
    return figures | row | {"gap": metrics.average_gap(figures, retrained)}


def fields_of(variant: Variant) -> dict:
    """The fields that identify a method, or a model without one."""
    version = {"method_version": METHODS[variant.method].version} if variant.method in METHODS else {}
    return variant._asdict() | version


def run(design: Setup, path: Path, made_by: dict, cache: Path) -> None:
    """Adds every row that the file at `path` lacks."""

    def add(make, variant=None, **key):
        rows.add(path, (fields_of(variant) if variant else {}) | key, make, made_by)

    chosen: dict[Variant, dict] = {}
    for variant in design.variants:
        if is_untuned(variant):
            chosen[variant] = {}
            continue
        for trial in range(design.trials):
            make = functools.partial(try_out, design, variant, trial, cache)
            add(make, variant, stage="trial", trial=trial, seed=TUNING_SEED)
        trials = rows.select(rows.read(path), stage="trial", **fields_of(variant))
        chosen[variant] = trials[tuning.best(trials, "blind")]["settings"]

    scores = lambda: {"scores": np.round(memorisation(design, cache), 4).tolist()}
    add(scores, stage="scores", shadows=2 * design.pairs, seed=POOL_SEED)

    def all_unlearned(variant):
        if variant.method in REFERENCES:
            return [getattr(model, REFERENCES[variant.method]).params for model in shadows(design, cache)]
        start = lambda model: (design, model.problem, model.original.params, variant, chosen[variant])
        return [unlearned(*start(model), seed).params for seed, model in enumerate(shadows(design, cache))]

    for variant in (*map(Variant, REFERENCES), *design.variants):
        make = lambda v=variant: attack(design, cache, all_unlearned(v)) | {"settings": chosen.get(v)}
        add(make, variant, stage="membership", seed=POOL_SEED)

    for seed in design.seeds:
        for kind in ("random", "memorised"):
            for variant in (*map(Variant, REFERENCES.values()), *design.variants):
                make = functools.partial(compare, design, cache, kind, variant, chosen.get(variant), seed)
                add(make, variant, stage="forget set", forget=kind, seed=seed)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path("eupmu_runs/models"))
    arguments = parser.parse_args()
    # Every training compiles its step again, although all shadow models share one program.
    jax.config.update("jax_compilation_cache_dir", str(arguments.cache.absolute() / "compiled"))
    run(Setup(), ROWS, origin.of(__file__), arguments.cache)


if __name__ == "__main__":
    main()
