"""A diffusion model of digits forgets a class: the original, the retrained model and methods at equal tuning.

Command:  uv run python experiments/diffusion/run.py --seeds 0 1 2
          with --data fashion_mnist the same for clothes
Time:     an hour and a half per seed on one core, for clothes five hours; rerun to resume.
Result:   experiments/diffusion/rows.jsonl, with a row for each model, where rows of older versions of a method are made
          again; and samples.npz, the samples of some models.

The model, the classifier that judges it and the attacks are those of `eupmu_jax.benchmark.diffusion`. Every method has
the same trials: points of a Sobol sequence in the three dimensions in which it is tuned elsewhere, with the forget
objectives of diffusion. No trial is selected: all are rows. EUPMU also has a row without settings. Seed 0 forgets class
1, seed 1 class 2, and so on.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

import eupmu_jax as eupmu
from eupmu_jax.benchmark import diffusion, rows, tuning
from eupmu_jax.benchmark.problems import RETRAINED_SEED_OFFSET
from eupmu_jax.methods import METHODS as ALL_METHODS
from eupmu_jax.methods import Choice, default_settings
from eupmu_jax.training.levels import measured_level
from experiments import origin

ROWS = Path(__file__).with_name("rows.jsonl")
SAMPLES = Path(__file__).with_name("samples.npz")
# Compiled programs are dropped after so many runs.
PROGRAMS = 15
# The name of the row of real images in place of samples.
REAL = "real images"
STEPS, FORGET_BATCH, RETAIN_BATCH = 150, 32, 96
OBJECTIVES = Choice(("random_condition", "unconditional", "negative_guidance"))
# All methods but those that need class labels, or scores, which this task has none of.
METHODS = tuple(
    name
    for name, method in ALL_METHODS.items()
    if "random_labels" not in method.forget and not {"num_classes", "score"} & set(method.requires)
)
# The methods run on clothes, where a run and its attack take twenty minutes.
FEW = (
    "fine-tuning",
    "weighted sum",
    "SalUn",
    "SCRUB",
    "PCGrad",
    "NGDiff",
    "EUPMU explicit",
    "EUPMU implicit",
    "EUPMU budget",
    "EUPMU",
)


class Plan(NamedTuple):
    """What is run on a subject.

    Attributes:
      subject: The images and networks.
      methods: Names of the methods.
      trials: Number of trials of each method.
      attacked: Trials that undergo all attacks; the others undergo only that on the embedding.
    """

    subject: diffusion.Subject
    methods: tuple[str, ...]
    trials: int
    attacked: tuple[str | int, ...]


DIGITS = Plan(diffusion.DIGITS, METHODS, 2, ("", tuning.UNTUNED, 0))
# All attacks on a model of clothes take ten minutes.
CLOTHES = Plan(diffusion.FASHION_MNIST, FEW, 1, ("", tuning.UNTUNED))
# Samples of each class kept for the figure, under the first seed, and the models and trials they come from.
SHOWN = 6
PICTURED = (("original", ""), ("retrained", ""), ("copied row", ""), ("weighted sum", 0), ("EUPMU", tuning.UNTUNED))


def forgotten_of(seed: int) -> int:
    """The class that is forgotten under a seed."""
    return (seed + 1) % diffusion.CLASSES


def settings(method: str, trial: int | str) -> dict:
    """The settings of a method in a trial."""
    if trial == tuning.UNTUNED:
        return {}
    chosen = ALL_METHODS[method]
    objectives = {"forget_objective": OBJECTIVES, "ascent_objective": OBJECTIVES}
    space = {name: objectives.get(name, part) for name, part in chosen.space.items()}
    return tuning.settings(chosen._replace(space=space), trial)


def trials(plan: Plan = DIGITS) -> list[tuple[str, int | str]]:
    """Every method's name with each of its trials."""
    untuned: list[tuple[str, int | str]] = [("EUPMU", tuning.UNTUNED)]
    return untuned + [(method, trial) for trial in range(plan.trials) for method in plan.methods]


def missing(found: list[dict], plan: Plan = DIGITS) -> list[tuple[str, int | str]]:
    """The trials without a row among these for the present version of their method and its ranges."""

    def done(method, trial):
        mine = rows.select(found, model=method, trial=trial, version=ALL_METHODS[method].version)
        return any(settings(method, trial).items() <= row["settings"].items() for row in mine)

    return [(method, trial) for method, trial in trials(plan) if not done(method, trial)]


def run(seed: int, out: Path, cache: Path, made_by: dict, plan: Plan = DIGITS) -> None:
    """Appends the rows of a seed that are missing."""
    subject = plan.subject
    forgotten = forgotten_of(seed)
    forget, retain = diffusion.sets(forgotten, subject)
    found = rows.select(rows.read(out), seed=seed) if out.is_file() else []
    done = {row["model"] for row in found}
    if REAL not in done:
        figures = diffusion.judge_real(forgotten, seed, subject)
        rows.append(
            out, {"model": REAL, "trial": "", "forget": f"class:{forgotten}", "seed": seed, **figures} | made_by
        )
    everything = np.arange(len(forget) + len(retain))
    trained = lambda ids, seed: diffusion.train(ids, seed, cache, subject.epochs, subject=subject)
    original, retrained = trained(everything, seed), trained(retain.ids, seed + RETRAINED_SEED_OFFSET)
    level = lambda params, part: measured_level(diffusion.plain_task(subject), params, part).error
    start = level(original.params, retain)

    def add(model, trial, params, **more):
        attack = diffusion.attacks if trial in plan.attacked else relearned
        figures = diffusion.judge(params, forgotten, seed, subject) | {
            "attacks": attack(params, forgotten, seed, subject)
        }
        figures |= {"rise": level(params, retain) - start, "forget_loss": level(params, forget)}
        row = {"model": model, "trial": trial, "forget": f"class:{forgotten}", "seed": seed, **figures, **more}
        if seed == 0 and (model, trial) in PICTURED:
            path = out.with_name(SAMPLES.name) if subject == diffusion.DIGITS else out.with_suffix(".npz")
            keep(f"{model}, {trial}".removesuffix(", "), params, path, subject)
        # Written last, since a model with a row is not run again.
        rows.append(out, row | made_by)
        print(seed, model, trial, {name: round(row[name], 4) for name in ("UA", "RA", "FD", "rise")}, flush=True)

    table = original.params["conditions"]["embedding"]
    copied = table.at[forgotten].set(table[(forgotten + 1) % diffusion.CLASSES])
    references = {"original": original.params, "retrained": retrained.params}
    references["copied row"] = original.params | {"conditions": {"embedding": copied}}
    for name, params in references.items():
        if name not in done:
            add(name, "", params)
    task = diffusion.task(original.params, subject)
    for index, (method, trial) in enumerate(missing(found, plan), 1):
        if index % PROGRAMS == 0:
            # Linux limits the memory maps of a process, and XLA needs some for each program: 45 runs exceed them.
            jax.clear_caches()
        given = default_settings(ALL_METHODS[method], task) | settings(method, trial)
        options = {"steps": STEPS, "seed": seed, "forget_batch": FORGET_BATCH, "retain_batch": RETAIN_BATCH}
        result = eupmu.unlearn(
            method, task, original.params, forget, retain, settings=given, **options, probes=1, warm=True
        )
        share = 100 * result.processor_seconds / retrained.processor_seconds
        more = {"share_of_retraining": share, "settings": given, "version": ALL_METHODS[method].version}
        if result.level is not None:
            more |= {"target": result.level.target, "limit": result.level.limit - result.level.start}
        add(method, trial, result.params, **more)


def relearned(params, forgotten: int, seed: int, subject: diffusion.Subject) -> dict[str, float]:
    """UA after the attack on the embedding."""
    return {
        "embedding": diffusion.ua(diffusion.relearned_row(params, forgotten, seed, subject), forgotten, seed, subject)
    }


def keep(name: str, params, path: Path, subject: diffusion.Subject) -> None:
    """Adds samples of every class, all from the same noise, to the file of samples."""
    labels = np.repeat(np.arange(diffusion.CLASSES), SHOWN)
    images = np.asarray(diffusion.samples(params, labels, 0, subject))
    pixels = np.round(127.5 * (images + 1)).astype(np.uint8).reshape(diffusion.CLASSES, SHOWN, *subject.shape[:2])
    kept = dict(np.load(path)) if path.is_file() else {}
    np.savez_compressed(path, **kept | {name: pixels})


def main():
    plans = {plan.subject.name: plan for plan in (DIGITS, CLOTHES)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--data", choices=list(plans), default=DIGITS.subject.name)
    parser.add_argument("--out", type=Path, help=f"{ROWS.name} beside this script, or of other data DATA.jsonl")
    parser.add_argument("--cache", type=Path, default=Path("eupmu_runs/models"))
    arguments = parser.parse_args()
    plan = plans[arguments.data]
    named = [] if plan is DIGITS else ["--data", arguments.data]
    out = arguments.out or (ROWS.with_name(f"{arguments.data}.jsonl") if named else ROWS)
    for seed in arguments.seeds:
        run(seed, out, arguments.cache, origin.of(__file__, "--seeds", seed, *named), plan)


if __name__ == "__main__":
    main()
