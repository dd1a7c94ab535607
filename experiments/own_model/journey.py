"""From ids to evidence: three successive deletion requests on a model of clothes, with the commands alone.

Command:  uv run python experiments/own_model/journey.py
Time:     eight minutes on 2 cores; nine the first time, which trains the model.
Result:   experiments/own_model/rows.jsonl; ledger, runs and reports in eupmu_runs/journey.

Two requests are for random images, the third is for a class. Each run starts from the result of the one before. Each
audit also checks what the earlier runs forgot, and compares with a model retrained without everything forgotten so far.
It needs Debian's package dataset-fashion-mnist.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np

from eupmu_jax.benchmark import rows
from eupmu_jax.service import user_file
from experiments import origin

FILE = Path(__file__).with_name("fashion_mnist.py")
PROGRAM = "from eupmu_jax.commands.cli import main; main()"
COMPILED = Path("eupmu_runs/compiled").absolute()
AT_RANDOM, CLASS = (200, 100), 7


def requests(labels: np.ndarray) -> dict[str, np.ndarray]:
    """The positions of each request by its reason; requests do not overlap."""
    shuffled = np.random.default_rng(0).permutation(np.flatnonzero(labels != CLASS))
    first, second, _ = np.split(shuffled, np.cumsum(AT_RANDOM))
    return {
        f"{len(first)} images at random": first,
        f"{len(second)} others at random": second,
        "all sneakers": np.flatnonzero(labels == CLASS),
    }


def eupmu(*arguments) -> int:
    """Runs `eupmu` as a user would, and returns its exit code."""
    command = [str(argument) for argument in arguments]
    print(f"\n$ {shlex.join(['eupmu', *command])}", flush=True)
    # The commands share one compilation cache.
    compiled = {"JAX_COMPILATION_CACHE_DIR": str(COMPILED), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}
    return subprocess.run([sys.executable, "-c", PROGRAM, *command], env=os.environ | compiled).returncode


def run(out: Path, file: Path = FILE, retrain: bool = False) -> list[dict]:
    """Handles all requests, optionally with a retrained model for each; returns a row for each."""
    out.mkdir(parents=True, exist_ok=True)
    labels, found = np.asarray(user_file.load(file, ("data",))["data"]["labels"]), []
    ledger, also = ("--ledger", out / "requests.db"), ["--retrain"] * retrain
    for number, (reason, ids) in enumerate(requests(labels).items(), 1):
        path, folder = out / f"ids{number}.txt", out / f"run{number}"
        path.write_text("\n".join(map(str, ids)))
        after = ("--after", out / f"run{number - 1}") if number > 1 else ()
        codes = [
            eupmu("request", "add", file, path, "--reason", reason, *ledger),
            eupmu("plan", file, "--request", number, "--epochs", 25, *ledger),
            eupmu("unlearn", file, "--request", number, "--out", folder, *also, *after, *ledger),
            eupmu("audit", folder, file),
            eupmu("report", folder),
            eupmu("verify", folder / "report.json", file),
        ]
        reached, audited = (json.loads((folder / f"{name}.json").read_text()) for name in ("reached", "audit"))
        names = ("verdict", "reasons", "original", "unlearned", "retrained", "earlier")
        kept = {name: audited[name] for name in names if name in audited}
        found.append({"request": number, "reason": reason, "codes": codes, "level": reached["level"], **kept})
    eupmu("request", "list", *ledger)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("eupmu_runs/journey"))
    parser.add_argument("--rows", type=Path, default=Path(__file__).with_name("rows.jsonl"))
    arguments = parser.parse_args()
    made_by = origin.of(__file__)
    rows.replace(arguments.rows, [row | made_by for row in run(arguments.out, retrain=True)])


if __name__ == "__main__":
    main()
