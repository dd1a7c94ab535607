"""A diffusion model of digits forgets a class: original, retrained, and methods at equal tuning, judged and attacked.

Command:  uv run python experiments/diffusion/run.py --seeds 0 1 2
          with --data fashion_mnist the same of clothes
Time:     half an hour a seed on one core, of clothes five hours a seed; goes on where it was stopped.
Result:   experiments/diffusion/rows.jsonl: a row for each model, those of older versions of a method made again;
          and samples.npz, what some of them draw.

Model, judge and attacks are those of `eupmu_jax.benchmark.diffusion`. Every method has the same trials: points of a
Sobol sequence in the three dimensions that it is tuned in elsewhere, with the forget objectives of diffusion. No trial
is chosen by what it reaches here: all are rows. EUPMU is there once more as it is without settings. Seed 0 forgets
class 1, and so on.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

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
STEPS, FORGET_BATCH, RETAIN_BATCH = 150, 32, 96
OBJECTIVES = Choice(("random_condition", "unconditional", "negative_guidance"))
METHODS = (
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
    """What is run of a subject.

    Attributes:
      subject: The images and networks.
      trials: Of every method.
      attacked: Trials that all attacks are made on; on the others it is that on the embedding alone.
    """

    subject: diffusion.Subject
    trials: int
    attacked: tuple[str | int, ...]


DIGITS = Plan(diffusion.DIGITS, 2, ("", tuning.UNTUNED, 0))
# All attacks on a model of clothes take ten minutes.
CLOTHES = Plan(diffusion.FASHION_MNIST, 1, ("", tuning.UNTUNED))
# Samples of each class that are kept for the picture, under the first seed, of models by their names and trials.
SHOWN = 6
PICTURED = (("original", ""), ("retrained", ""), ("copied row", ""), ("weighted sum", 0), ("EUPMU", tuning.UNTUNED))


def forgotten_of(seed: int) -> int:
    """The class that is forgotten under a seed."""
    return (seed + 1) % diffusion.CLASSES


def settings(method: str, trial: int | str) -> dict:
    """What the method is given in a trial."""
    if trial == tuning.UNTUNED:
        return {}
    chosen = ALL_METHODS[method]
    space = {name: OBJECTIVES if name == "forget_objective" else part for name, part in chosen.space.items()}
    return tuning.settings(chosen._replace(space=space), trial)


def trials(plan: Plan = DIGITS) -> list[tuple[str, int | str]]:
    """Every method's name with each of its trials."""
    untuned: list[tuple[str, int | str]] = [("EUPMU", tuning.UNTUNED)]
    return untuned + [(method, trial) for trial in range(plan.trials) for method in METHODS]


def missing(found: list[dict], plan: Plan = DIGITS) -> list[tuple[str, int | str]]:
    """The trials that have no row of their method and its ranges as they are now among these."""

    def done(method, trial):
        mine = rows.select(found, model=method, trial=trial, version=ALL_METHODS[method].version)
        return any(settings(method, trial).items() <= row["settings"].items() for row in mine)

    return [(method, trial) for method, trial in trials(plan) if not done(method, trial)]


def run(seed: int, out: Path, cache: Path, made_by: dict, plan: Plan = DIGITS) -> None:
    """Appends a row for each model of a seed that is not there yet."""
    subject = plan.subject
    forgotten = forgotten_of(seed)
    forget, retain = diffusion.sets(forgotten, subject)
    everything = np.arange(len(forget) + len(retain))
    trained = lambda ids, seed: diffusion.train(ids, seed, cache, subject.epochs, subject=subject)
    original, retrained = trained(everything, seed), trained(retain.ids, seed + RETRAINED_SEED_OFFSET)
    level = lambda params, part: measured_level(diffusion.plain_task(subject), params, part).error
    start = level(original.params, retain)
    found = rows.select(rows.read(out), seed=seed) if out.is_file() else []
    done = {row["model"] for row in found}

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
        # Last, as a model that has its row is not made again.
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
    for method, trial in missing(found, plan):
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
    """Adds samples of every class to the file of pictures: all from the same noise."""
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
