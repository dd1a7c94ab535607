"""Membership example by example, with shadow models: U-LiRA on unlearned models, and forget sets of memorised examples.

Command:  uv run python experiments/shadows/run.py
Time:     about 16 minutes of one core; finished rows are not repeated.
Result:   experiments/shadows/rows.jsonl, a row for each trial, for each method's attack and for each model judged.

2,000 images of Fashion-MNIST are cut into halves, 16 times at random, and a small CNN is trained on each of the 32. A
tenth of the images, drawn at random, are *targets*, half of them in each half. Two things are asked of a method:

1. U-LiRA. Every shadow model unlearns the targets of its half. A target's phi under the 16 models that learned and
   unlearned it is held against phi under 16 models that never saw it, trained anew on the other halves without their
   targets. The *control* is the first world trained anew in the same way: nothing should be found there.
2. Forget sets that are hard. The 32 models give each image a memorisation score. Models of further halves, one for each
   seed, unlearn a tenth of their images, at random or those with the highest scores, and are held against the model
   retrained without them.

A method's settings are those of the best of 8 random trials by the blind score of the classification benchmark, on one
problem of images drawn anew and a random forget set, with the accuracy on further test images. They serve both parts:
no tuning knows shadow models, memorised examples or the test images that are reported. EUPMU, which finds by itself how
far to forget, has no trials: it is told the error of those further images instead. A method that leaves the forget
objective open is tuned with each of two objectives, on the same numbers. All step with Adam; a run passes at most as
many examples as 40 steps of 32 + 96, a backward pass counted as two forward.
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
# What an attack is shown besides unlearned models, and which model of a `Shadow` that is.
REFERENCES = {"original": "original", "control": "retrained"}


@functools.cache
def tuning_problem(design: Setup, cache: Path) -> tuple[problems.Problem, chex.ArrayTree, dict]:
    """The task that methods are tuned on, its original model, and the figures of that."""
    made = make_problem(design, design.size // 2, TUNING_SEED)
    ids = np.arange(len(made.dataset.train_labels))
    params = problems.train(made, ids, init_seed=TUNING_SEED, cache=cache, on_step=lambda: None).params
    return made, params, figures_of(made, params)


def figures_of(made: problems.Problem, params: chex.ArrayTree) -> dict:
    """For the tuning: with VA, the accuracy on examples that are not reported."""
    return judge(made, params, TUNING_SEED)[1] | {"VA": problems.held_out_accuracy(made, params)}


def try_out(design: Setup, variant: Variant, trial: int, cache: Path) -> dict:
    """Fields of a trial's row."""
    made, original, before = tuning_problem(design, cache)
    settings = draw(variant, trial)
    figures = figures_of(made, unlearned(design, made, original, variant, settings, TUNING_SEED).params)
    blind = tuning.blind_score(figures, before)
    finite = np.isfinite([blind, figures["retain_loss"]]).all()
    return figures | {"settings": settings, "blind": blind if finite else tuning.DIVERGED}


def worlds(phi: np.ndarray, never: np.ndarray, members: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """From each pair of shadow models phi of that which had the example, and `never` of the other one.

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
    """That of the models which saw no target."""
    made = pool(design)
    return np.array(
        [
            phi(design, fitting.predict(made.functions.apply, m.retrained.params, made.tree["inputs"]))
            for m in shadows(design, cache)
        ]
    )


def attack(design: Setup, cache: Path, params: list[chex.ArrayTree]) -> dict:
    """U-LiRA on the models `params`, one for each shadow model, and what they are worth.

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
    """A share of a half that no shadow model had, at random or by memorisation; and the retrained model's figures."""
    shadow, dataset = 2 * (design.pairs + seed), pool(design).dataset
    ids, name = half(design, shadow), f"{kind}:{design.forget}"
    labels, scores = dataset.train_labels[ids], memorisation(design, cache)[ids]
    split = data.split(labels, name, num_classes=dataset.num_classes, seed=seed, scores=scores)
    found = shadow_of(design, shadow, tuple(ids[split.forget_ids].tolist()), cache)
    return found, judge(found.problem, found.retrained.params, seed)[1]


def compare(design: Setup, cache: Path, kind: str, variant: Variant, settings: dict | None, seed: int) -> dict:
    """Figures of one model and their gap to the retrained one's."""
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
    """What a row says of a method, or of a model that none made."""
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
    # Every training compiles its step anew, although all shadow models share one program.
    jax.config.update("jax_compilation_cache_dir", str(arguments.cache.absolute() / "compiled"))
    run(Setup(), ROWS, origin.of(__file__), arguments.cache)


if __name__ == "__main__":
    main()
