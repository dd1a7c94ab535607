"""How long the steps of EUPMU may become: by learning rate, with and without steps that exceed it.

Command:  uv run python experiments/level/steps.py
Time:     about ten minutes on one core, and ten more to train the models.
Result:   experiments/level/rows.jsonl: a row of the kind "steps" for each run.

Emoji as in the classification benchmark, on seeds 100 and 101, which it does not report. The forget sets are a random
10 % and a class. Everything else is the default of `eupmu.unlearn("EUPMU", ...)`.
"""

import argparse
import itertools
from pathlib import Path

from eupmu_jax import metrics
from eupmu_jax.benchmark import designs, problems, protocol, rows
from eupmu_jax.methods import METHODS, default_settings, eupmu_level
from eupmu_jax.training._step import jitted_step
from eupmu_jax.training.unlearning import unlearn
from experiments import origin

ROWS = Path(__file__).with_name("rows.jsonl")
DESIGN = designs.design("emoji-resnet")
SEEDS, RATES, LONGEST = (100, 101), (1e-4, 3e-4, 1e-3, 3.16e-3), (1.0, eupmu_level.LONGEST)
VERSION = METHODS["EUPMU"].version


def run(case: designs.Case, seed: int, learning_rate: float, cache: Path) -> dict:
    """The figures of the unlearned model."""
    reference = protocol.reference(DESIGN, case, seed, cache)
    problem, original = reference.problem, reference.judged_original.figures
    settings = {"learning_rate": learning_rate}
    result = unlearn(
        "EUPMU",
        problem.task,
        reference.original.params,
        problem.forget,
        problem.retain,
        problem.held_out,
        steps=case.steps,
        settings=default_settings(METHODS["EUPMU"], problem.task) | settings,
        seed=seed,
        forget_batch=case.forget_batch,
        retain_batch=case.retain_batch,
        start=problems.start_of(original),
    )
    figures = protocol.judge(problem, result.params, DESIGN.shadow_size).figures
    gap = metrics.average_gap(figures, reference.judged_retrained.figures)
    return {"UA": figures["UA"], "RA": figures["RA"], "gap": gap, "share": result.share}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROWS)
    parser.add_argument("--cache", type=Path, default=Path("eupmu_runs/level"), help="folder of the trained models")
    arguments = parser.parse_args()
    made, made_by = rows.read(arguments.out), origin.of(__file__)
    for case, seed, longest in itertools.product(DESIGN.cases, SEEDS, LONGEST):
        # The compiled step has this constant built in.
        eupmu_level.LONGEST = longest
        jitted_step.cache_clear()
        for learning_rate in RATES:
            about = {"kind": "steps", "forget": case.forget, "seed": seed, "longest": longest}
            about |= {"learning_rate": learning_rate, "method_version": VERSION}
            if not rows.select(made, **about):
                rows.append(arguments.out, about | run(case, seed, learning_rate, arguments.cache) | made_by)


if __name__ == "__main__":
    main()
