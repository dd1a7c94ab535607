"""How many random settings keep a budget, and how near they come to the retrained model.

Command:  uv run python experiments/robustness/run.py --data digits               (and --data fashion_mnist)
Time:     digits about 15 minutes on one core, Fashion-MNIST about 50; finished rows are not repeated.
Result:   experiments/robustness/rows.jsonl, one row for each method and setting.

A setting is an optimizer, a learning rate from its two decades, a number of epochs, a ratio of retain to forget
examples in a step, and a seed of models, split and batches. The methods' own numbers are fixed: gain and initial
multiplier are those of the trial of `experiments/budgets` that won most often over optimizers and both data sets, on
another seed; the reference has the class defaults of the released code; fixed weights are 1, 3 and 9. A random 10 % of
the training examples are forgotten; the loss on the whole retain set may rise by 0.02 nats.

Every run is evaluated at both ends, in the row's fields `..._last` and `..._returned`: the parameters after the last
step, without any measurement, and the checkpoint that a run within a budget returns.
"""

import argparse
import functools
from pathlib import Path

import jax
import numpy as np

from eupmu_jax import metrics
from eupmu_jax.benchmark import rows
from experiments import origin
from experiments.budgets import one_run
from experiments.budgets import run as budgets
from experiments.budgets.methods import Program, Tuning
from experiments.budgets.run import LEARNING_RATES, RISE, SCHEDULES, log_uniform

ROWS = Path(__file__).with_name("rows.jsonl")


@functools.cache
def tuned(method: str) -> tuple[str, dict]:
    """The method with gain and multiplier of its most frequent winner, the same for every optimizer."""
    tuning = [rows.select(rows.read(budgets.ROWS), data=data, stage="tuning") for data in one_run.SIZES]
    best = [(program, row) for found in tuning for program, row in budgets.winners(found).items()]
    trials = [row["trial"] for program, row in best if (program.method, program.scale) == (method, "raw")]
    if not trials:
        raise SystemExit("run experiments/budgets on both data sets first: its tuning decides the numbers")
    setting = budgets.draw("sgd", max(sorted(set(trials)), key=trials.count))
    return method, {"gain": setting.gain, "multiplier": setting.multiplier}


METHODS = {
    "barrier": lambda: tuned("barrier"),
    "PI": lambda: tuned("PI"),
    "step tolerance, explicit": lambda: ("step tolerance", {}),
    "step tolerance, implicit": lambda: tuned("P"),
    "reference preset": lambda: ("reference", {"multiplier": 0.0}),
    "fixed weight 1": lambda: ("fixed weight", {"multiplier": 1.0}),
    "fixed weight 3": lambda: ("fixed weight", {"multiplier": 3.0}),
    "fixed weight 9": lambda: ("fixed weight", {"multiplier": 9.0}),
}


def draw(number: int) -> dict:
    """A random setting, the same for every method."""
    rng = np.random.default_rng(number)
    optimizer = str(rng.choice(list(LEARNING_RATES)))
    return {
        "optimizer": optimizer,
        "learning_rate": log_uniform(rng, *LEARNING_RATES[optimizer]),
        "epochs": int(rng.choice([2, 5, 10])),
        "retain_ratio": int(rng.choice([3, 9])),
        "seed": int(rng.integers(5)),
    }


def unlearn(given, method, setting) -> dict:
    """One run, as the fields of a row."""
    name, numbers = METHODS[method]()
    scale = "log" if name == "reference" else "raw"
    result = one_run.run(
        given,
        Program(name, scale, setting["optimizer"]),
        Tuning(setting["learning_rate"], **numbers),
        RISE,
        epochs=setting["epochs"],
        seed=setting["seed"],
        decay=SCHEDULES["linear"],
        retain_ratio=setting["retain_ratio"],
    )
    over = lambda level: (level - given.figures["retain_loss"]) / RISE - 1
    row = {
        "rise": RISE,
        "numbers": numbers,
        "overshoot_last": over(result.history["levels"][-1][0]),
        "overshoot_returned": over(float(result.best.levels[0])),
        "infeasible": bool(result.best.infeasible),
        "full_passes": result.full_passes,
    }
    for end, params in (("last", result.last), ("returned", result.best.params)):
        figures = one_run.evaluate(given.classifier, params)
        row |= {f"{figure}_{end}": figures[figure] for figure in metrics.GAP_METRICS}
        row[f"gap_{end}"] = metrics.average_gap(figures, given.retrained)
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=one_run.SIZES, default="digits")
    parser.add_argument("--settings", type=int, default=60)
    parser.add_argument("--cache", type=Path, default=Path("eupmu_runs/models"))
    arguments = parser.parse_args()
    made_by = origin.of(__file__, "--data", arguments.data, "--settings", arguments.settings)
    problems = {}
    for number, setting in enumerate(map(draw, range(arguments.settings))):
        seed = setting["seed"]
        if seed not in problems:
            problems[seed] = one_run.problem(arguments.data, "random:10%", seed, arguments.cache)
        for method in METHODS:
            key = {"data": arguments.data, "method": method, "number": number, **setting}
            rows.add(ROWS, key, functools.partial(unlearn, problems[seed], method, setting), made_by)
        if number % 15 == 14:
            jax.clear_caches()  # Every compiled program takes memory maps, of which a process has a limited number.


if __name__ == "__main__":
    main()
