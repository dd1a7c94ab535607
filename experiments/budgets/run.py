"""Holds a budget for the retain loss with every controller, loss scale and optimizer, at equal tuning.

Command:  uv run python experiments/budgets/run.py --data digits                  (and --data fashion_mnist)
Time:     digits about 10 minutes on one core, Fashion-MNIST about 45; finished rows are not repeated.
Result:   experiments/budgets/rows.jsonl: rows of the stages "tuning", "models", "grid", "anchored" and "cnn".

Digits is an MLP on all 1,437 training images, Fashion-MNIST an MLP on 20,000 drawn at random. The limit is the original
model's loss on the whole retain set plus B, 0.02 nats.

Tuning draws the same number of random settings for every method, optimizer and scale, on a seed that the grid does not
use, and selects the one whose returned checkpoint has the highest forget loss; it never sees a retrained model. The log
scale and the warm restarts are run for random forgetting only. Stage "anchored" repeats barrier and PI with the level
estimated as the last full measurement plus the change on the batch since then, which costs another forward pass over
the retain batch. Stage "cnn", for the seeds of `--cnn-seeds`, repeats barrier, PI and reference on the small CNN with
the settings found on the MLP.

Overshoot is in units of B, measured on the whole retain set, after the last step and at the checkpoint that the run
returns. `inside` is the share of 10 points in time, evenly spread over the run, at which the whole retain set's loss
kept the limit.
"""

import argparse
import functools
import itertools
from pathlib import Path

import numpy as np

from eupmu_jax.benchmark import rows
from experiments import origin
from experiments.budgets import one_run
from experiments.budgets.methods import OPTIMIZERS, Program, Tuning

ROWS = Path(__file__).with_name("rows.jsonl")

RISE = 0.02
EPOCHS = {"digits": 15, "fashion_mnist": 5}
FORGET = {"random": "random:10%", "class": "class:3"}
GRID = ("P", "I", "PI", "PHR", "barrier", "guard", "reference")
LEARNING_RATES = {"sgd": (0.03, 3.0), "adam": (1e-4, 1e-2), "muon": (1e-3, 1e-1)}
TUNING_SEED = 100


def log_uniform(rng, low, high):
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def draw(optimizer: str, trial: int) -> Tuning:
    """The same settings for every method."""
    rng = np.random.default_rng(trial)
    return Tuning(
        learning_rate=log_uniform(rng, *LEARNING_RATES[optimizer]),
        gain=log_uniform(rng, 0.1, 10.0),
        multiplier=log_uniform(rng, 0.1, 10.0),
    )


def restarts(steps: int) -> np.ndarray:
    """Four cosine cycles, each from the peak to 0 (Loshchilov and Hutter, 2017)."""
    return 0.5 * (1 + np.cos(np.pi * (4 * np.arange(steps) / steps % 1)))


SCHEDULES = {"linear": lambda steps: 1 - np.arange(steps) / steps, "restarts": restarts}


def programs():
    """All programs that are compared; the released code only has the log scale."""
    for program in itertools.starmap(Program, itertools.product(GRID, ("raw", "log"), OPTIMIZERS)):
        if program[:2] != ("reference", "raw"):
            yield program


def is_usual(program):
    """Whether the program uses raw losses, or the only scale that it has."""
    return program.scale == "raw" or program.method == "reference"


def winners(tuning: list[dict]) -> dict[Program, dict]:
    """The tuning row of each program that forgot most within the limit."""
    best: dict[Program, dict] = {}
    for row in tuning:
        program = Program(row["method"], row["scale"], row["optimizer"])
        if program not in best or row["forget_loss"] > best[program]["forget_loss"]:
            best[program] = row
    return best


def unlearn(given, program, setting, schedule, *, traced, anchored=False):
    """One run, as the fields of a row."""
    task, start = given.classifier, given.figures["retain_loss"]
    trace = [] if traced else None
    result = one_run.run(
        given,
        program,
        setting,
        RISE,
        epochs=EPOCHS[task.dataset.name],
        seed=task.seed,
        decay=SCHEDULES[schedule],
        anchored=anchored,
        trace=trace,
    )
    over = lambda level: (level - start) / RISE - 1
    row = {
        "data": task.dataset.name,
        "seed": task.seed,
        **program._asdict(),
        "schedule": schedule,
        "rise": RISE,
        "setting": setting._asdict(),
        "overshoot_last": over(result.history["levels"][-1][0]),
        "overshoot_returned": over(float(result.best.levels[0])),
        "forget_loss": -float(result.best.forget_loss),
        "infeasible": bool(result.best.infeasible),
        "full_passes": result.full_passes,
    }
    if traced:
        row |= {"inside": float(np.mean(np.array(trace[1:]) <= start + RISE)), "start": start, "trace": trace}
        for end, params in (("last", result.last), ("returned", result.best.params)):
            row |= {f"{name}_{end}": value for name, value in one_run.accuracies(given, params).items()}
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=EPOCHS, default="digits")
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--cnn-seeds", type=int, nargs="*", default=[])
    parser.add_argument("--cache", type=Path, default=Path("eupmu_runs/models"))
    arguments = parser.parse_args()
    cnn = ["--cnn-seeds", *arguments.cnn_seeds] if arguments.cnn_seeds else []
    made_by = origin.of(__file__, "--data", arguments.data, *cnn)

    def add(make, **key):
        rows.add(ROWS, {"data": arguments.data, **key}, make, made_by)

    given = one_run.problem(arguments.data, FORGET["random"], TUNING_SEED, arguments.cache)
    for program, trial in itertools.product(programs(), range(arguments.trials)):
        make = functools.partial(unlearn, given, program, draw(program.optimizer, trial), "linear", traced=False)
        add(make, stage="tuning", forget=FORGET["random"], trial=trial, **program._asdict())

    best = winners(rows.select(rows.read(ROWS), data=arguments.data, stage="tuning"))
    for seed, forget in itertools.product(arguments.seeds, FORGET.values()):
        given = one_run.problem(arguments.data, forget, seed, arguments.cache)
        for model, figures in (("original", given.figures), ("retrained", given.retrained)):
            add(figures.copy, stage="models", forget=forget, seed=seed, model=model)
        for program, schedule in itertools.product(programs(), SCHEDULES):
            if forget == FORGET["class"] and not (is_usual(program) and schedule == "linear"):
                continue
            if schedule == "restarts" and not is_usual(program):
                continue
            make = functools.partial(unlearn, given, program, Tuning(**best[program]["setting"]), schedule, traced=True)
            add(make, stage="grid", forget=forget, seed=seed, schedule=schedule, **program._asdict())

    anchored = [program for program in programs() if program.method in ("barrier", "PI") and is_usual(program)]
    for seed in arguments.seeds:
        given = one_run.problem(arguments.data, FORGET["random"], seed, arguments.cache)
        for program in anchored:
            setting = Tuning(**best[program]["setting"])
            make = functools.partial(unlearn, given, program, setting, "linear", traced=True, anchored=True)
            add(make, stage="anchored", forget=FORGET["random"], seed=seed, **program._asdict())

    for seed in arguments.cnn_seeds:
        given = one_run.problem(arguments.data, FORGET["random"], seed, arguments.cache, model="cnn")
        for program in programs():
            if program.method in ("barrier", "PI", "reference") and is_usual(program):
                setting = Tuning(**best[program]["setting"])
                make = functools.partial(unlearn, given, program, setting, "linear", traced=True)
                add(make, stage="cnn", forget=FORGET["random"], seed=seed, **program._asdict())


if __name__ == "__main__":
    main()
