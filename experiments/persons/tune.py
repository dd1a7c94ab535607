"""Tunes eight methods of `run.py` alike: the middle of their ranges and two more points.

Command:  uv run --extra language python experiments/persons/tune.py
Time:     four to eight hours on two cores; a rerun resumes.
Result:   experiments/persons/trials.jsonl: under seed 0 a row for each trial of each method; under seeds 1 and 2 one
          for the trial that `chosen` selects, unless that is the middle, whose rows `run.py` makes.
"""

import argparse
import os
from pathlib import Path

if __name__ == "__main__":
    # Set before JAX is imported: pass pretrained weights to each program instead of embedding them in it.
    os.environ.setdefault("JAX_USE_SIMPLIFIED_JAXPR_CONSTANTS", "1")

from eupmu_jax.benchmark import rows
from eupmu_jax.methods import METHODS
from experiments import origin, parts
from experiments.persons import run

TRIALS_FILE = Path(__file__).with_name("trials.jsonl")
# Points of the unit cube of `tuning`, besides the middle.
TRIALS = (1, 2)
TUNED = (
    ("EUPMU", "bounded_ascent"),
    ("weighted sum", "wga"),
    ("weighted sum", "dpo"),
    ("weighted sum", "undial"),
    ("EUPMU", "level_of_probability"),
    ("EUPMU next-batch", "npo"),
    ("weighted sum", "simnpo"),
    ("weighted sum", "lrml"),
)
# A model keeps its utility if it loses at most this share of the original model's.
KEPT = 0.01


def tried(found: list[dict], trials: list[dict], candidate: tuple[str, str]) -> list[dict]:
    """A candidate's rows under seed 0: the middle, whose `trial` is None, and its trials."""
    key = dict(zip(("model", "objective"), candidate, strict=True)) | {"seed": 0}
    middle = parts.newest(rows.select(found, **key), *key)
    return [*(row | {"trial": None} for row in middle), *of_now(rows.select(trials, **key))]


def chosen(found: list[dict], trials: list[dict], candidate: tuple[str, str]) -> dict:
    """The row of the selected trial, chosen without the retrained model.

    Among those that keep utility within 1 % of the original model's, the one whose error on the forgotten persons is
    nearest to the original model's on persons who were never shown; if none keeps it, the one with the highest utility.
    """
    original = rows.select(found, model="original", seed=0)[0]
    mine = tried(found, trials, candidate)
    keeping = [row for row in mine if row["utility"] >= (1 - KEPT) * original["utility"]]
    if not keeping:
        return max(mine, key=lambda row: row["utility"])
    return min(keeping, key=lambda row: abs(row["error"]["forget"] - original["held_out_error"]))


def of_now(trials):
    """The trials of the current versions of their methods."""
    return [row for row in trials if row["version"] == METHODS[row["model"]].version]


def tune(seeds: list[int], found: list[dict], out: Path, cache: Path, made_by: dict) -> None:
    """Appends the missing trials: all under seed 0, the selected one under the other seeds."""
    for seed in seeds:
        for candidate in TUNED:
            trials = of_now(rows.read(out)) if out.is_file() else []
            wanted = TRIALS if seed == 0 else (chosen(found, trials, candidate)["trial"],)
            done = {
                row["trial"] for row in trials if (row["model"], row["objective"], row["seed"]) == (*candidate, seed)
            }
            for trial in wanted:
                if trial is not None and trial not in done:
                    row = run.unlearned(run.models_of(seed, cache), *candidate, trial)
                    rows.append(out, row | {"trial": trial} | made_by)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=TRIALS_FILE)
    parser.add_argument("--cache", type=Path, default=Path("eupmu_runs/models"))
    arguments = parser.parse_args()
    made_by = origin.of(__file__, "--seeds", *arguments.seeds)
    tune(arguments.seeds, rows.read(run.ROWS), arguments.out, arguments.cache, made_by)


if __name__ == "__main__":
    main()
