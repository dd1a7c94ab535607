"""Utility and forget quality of the methods of `tune.py` at intermediate steps; `run.py` has rows for the last step.

Command:  uv run --extra language python experiments/persons/over_time.py
Time:     two hours on two cores; a rerun resumes.
Result:   experiments/persons/over_time.jsonl: a row for each method and step, under seed 0.
"""

import argparse
import os
from pathlib import Path
from tempfile import TemporaryDirectory

if __name__ == "__main__":
    # Set before JAX is imported: pass pretrained weights to each program instead of embedding them in it.
    os.environ.setdefault("JAX_USE_SIMPLIFIED_JAXPR_CONSTANTS", "1")

import chex
import jax
import orbax.checkpoint as ocp

from eupmu_jax.benchmark import persons, rows
from eupmu_jax.methods import METHODS
from experiments import origin
from experiments.persons import run
from experiments.persons.tune import TUNED, of_now

ROWS = Path(__file__).with_name("over_time.jsonl")
SEED = 0
# Steps between evaluations before the end of a run.
EVERY = 10


def path(models: run.Models, method: str, objective: str) -> dict[int, chex.ArrayTree]:
    """The parameters of a run after every `EVERY` steps, from its checkpoints."""
    found: dict[int, chex.ArrayTree] = {}
    like = {"params": jax.eval_shape(lambda: models.original.params)}
    restore_args = ocp.checkpoint_utils.construct_restore_args(like)
    # Only the parameters, in their own structure.
    wanted = ocp.args.PyTreeRestore(item=like, restore_args=restore_args, partial_restore=True)
    with TemporaryDirectory() as directory, ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpoints:
        folders = {step: Path(directory).absolute() / str(step) for step in range(EVERY, run.STEPS, EVERY)}

        def look():
            # A folder gets its name once it is complete, and keeps it until two more are written.
            for step, folder in folders.items():
                if step not in found and folder.is_dir():
                    found[step] = checkpoints.restore(folder / "state", args=wanted)["params"]

        run.unlearn(models, method, objective, directory=directory, save_every=EVERY, on_step=look)
        look()
    return found


def row_of(models: run.Models, method: str, objective: str, step: int, params: chex.ArrayTree) -> dict:
    """The row with the figures of utility and of the forgotten persons at a step."""
    figures = persons.as_tofu(params, models.parts)
    kept = {name: figures[name] for name in ("probability", "truth_ratios", "error", "utility")}
    key = {"model": method, "objective": objective, "seed": models.seed, "step": step}
    print(*key.values(), f"{kept['utility']:.3f}", flush=True)
    return key | kept | {"version": METHODS[method].version}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROWS)
    parser.add_argument("--cache", type=Path, default=Path("eupmu_runs/models"))
    arguments = parser.parse_args()
    models, made_by = run.models_of(SEED, arguments.cache), origin.of(__file__)
    for method, objective in TUNED:
        found = of_now(rows.read(arguments.out)) if arguments.out.is_file() else []
        if not rows.select(found, model=method, objective=objective):
            # Written together, so that an interrupted run is repeated as a whole.
            made = [row_of(models, method, objective, *point) for point in path(models, method, objective).items()]
            for row in made:
                rows.append(arguments.out, row | made_by)


if __name__ == "__main__":
    main()
