"""The gap to the retrained model against the compute that unlearning may take, for several methods and optimizers.

Command:  uv run python experiments/compute/run.py                 (and with --problem, --methods, --seeds, --shares)
Time:     about an hour and a half on 2 cores for the MLP; finished rows are not repeated.
Result:   experiments/compute/rows.jsonl, one row for each problem, method, optimizer, budget, learning rate and seed.

A budget is a share of the passes of retraining, in which a backward pass counts as two forward ones; what a method does
before its first and after its last step counts too. EUPMU and EUPMU transport run untuned. Every other method runs with
Adam, SGD and Muon; for each optimizer and budget the learning rate with the best blind score (`benchmark.tuning`) of
three is taken, on a seed of its own, and then run on the reported seeds. All else are the methods' defaults.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

from eupmu_jax import metrics
from eupmu_jax.benchmark import protocol, rows, tuning
from eupmu_jax.benchmark.designs import Case, Design
from eupmu_jax.benchmark.jobs import keep_compiled_code
from eupmu_jax.benchmark.problems import Recipe, start_of
from eupmu_jax.methods import METHODS, default_settings
from eupmu_jax.methods.passes import affordable_steps
from eupmu_jax.training.unlearning import unlearn
from experiments import origin

ROWS = Path(__file__).with_name("rows.jsonl")
CACHE = Path("eupmu_runs/compute")
# In percent of the passes of retraining.
SHARES = (1.0, 2.5, 5.0, 10.0, 20.0)
UNTUNED = ("EUPMU transport", "EUPMU")
TUNED = (
    "fine-tuning",
    "random labels",
    "SalUn",
    "SalUn-soft",
    "SCRUB",
    "GDR-GMA",
    "UPGrad",
    "Bad Teacher",
)
# Learning rates; for Muon times the number of steps, as in `default_optimizer`.
RATES = {"adam": (3e-4, 1e-3, 3e-3), "sgd": (0.01, 0.05, 0.25), "muon": (0.3, 1.0, 3.0)}
TUNING_SEED = 100

PROBLEMS = {
    "mlp": Design(
        "fashion_mnist",
        "mlp",
        6_000,
        Recipe(60, 64, 1e-3),
        (Case("random:10%", 1, 50, 50),),
        trials=1,
        seeds=(0, 1, 2, 3, 4),
        held_out=1_000,
        shadow_size=1_000,
    ),
    "resnet": Design(
        "fashion_mnist",
        "resnet8-stride2",
        4_000,
        Recipe(40, 64, 1e-3),
        (Case("random:10%", 1, 32, 32),),
        trials=1,
        seeds=(0, 1),
        held_out=1_000,
        shadow_size=1_000,
        test_size=3_000,
        version=2,
    ),
}


class Run(NamedTuple):
    """A row to be made; `optimizer` is None for a method that runs with its own, and then so is `rate`."""

    problem: str
    method: str
    optimizer: str | None
    share: float
    rate: float | None
    seed: int

    def key(self) -> dict:
        """The fields that identify the row."""
        return self._asdict() | {"method_version": METHODS[self.method].version}


def wanted(problem: str, methods, share: float, seeds, found: list[dict]) -> list[Run]:
    """The runs of one budget that can be made now: all trials, and the selected ones of those that are finished."""
    runs = []
    for method in methods:
        if method in UNTUNED:
            runs += [Run(problem, method, None, share, None, seed) for seed in seeds]
            continue
        for optimizer, rates in RATES.items():
            trials = [Run(problem, method, optimizer, share, rate, TUNING_SEED) for rate in rates]
            made = [row for trial in trials for row in rows.select(found, **trial.key())]
            if len(made) < len(trials):
                runs += trials
            else:
                best = min(made, key=lambda row: row["blind"])["rate"]
                runs += [Run(problem, method, optimizer, share, best, seed) for seed in seeds]
    return [run for run in runs if not rows.select(found, **run.key())]


def make(run: Run) -> dict:
    """The figures of a run."""
    design = PROBLEMS[run.problem]
    (case,) = design.cases
    reference = protocol.reference(design, case, run.seed, CACHE)
    problem, retrained = reference.problem, reference.judged_retrained.figures
    settings = default_settings(METHODS[run.method], problem.task)
    counts, sizes = (len(problem.forget), len(problem.retain)), (case.forget_batch, case.retain_batch)
    most = max(1, round(run.share / 100 * reference.retrained.examples / sum(sizes)))
    spent = lambda given: affordable_steps(run.method, given, problem.task, counts, most, sizes, len(problem.held_out))
    if run.optimizer is not None:
        settings |= {"optimizer": run.optimizer, "learning_rate": run.rate}
        if run.optimizer == "muon":
            settings["learning_rate"] = run.rate / spent(settings)
    result = unlearn(
        run.method,
        problem.task,
        reference.original.params,
        problem.forget,
        problem.retain,
        problem.held_out,
        steps=spent(settings),
        settings=settings,
        seed=run.seed,
        forget_batch=sizes[0],
        retain_batch=sizes[1],
        start=start_of(reference.judged_original.figures),
        probes=0,
    )
    judged = protocol.judge(problem, result.params, design.shadow_size).figures
    original = reference.judged_original.figures
    passes = 100 * (result.forward + 2 * result.backward) / (3 * reference.retrained.examples)
    return {name: judged[name] for name in ("UA", "RA", "TA", "MIA", "retain_loss")} | {
        "gap": metrics.average_gap(judged, retrained),
        "blind": tuning.blind_score(judged, original),
        "gap_of_original": metrics.average_gap(original, retrained),
        "passes_of_retraining": passes,
        "seconds_of_retraining": 100 * result.processor_seconds / reference.retrained.processor_seconds,
        "steps": result.steps,
        "path_kept": result.share,
        "settings": settings,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problem", choices=PROBLEMS, default="mlp")
    parser.add_argument("--methods", nargs="+", choices=(*UNTUNED, *TUNED), default=(*UNTUNED, *TUNED))
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--shares", nargs="+", type=float, choices=SHARES, default=SHARES)
    arguments = parser.parse_args()
    keep_compiled_code(CACHE / "programs")
    seeds = arguments.seeds or PROBLEMS[arguments.problem].seeds
    for share in arguments.shares:
        made = lambda: rows.read(ROWS) if ROWS.exists() else []
        while pending := wanted(arguments.problem, arguments.methods, share, seeds, made()):
            # Models of one seed are loaded once.
            for run in sorted(pending, key=lambda run: run.seed):
                rows.append(ROWS, rows.finite(run.key() | make(run)) | origin.of(__file__))


if __name__ == "__main__":
    main()
