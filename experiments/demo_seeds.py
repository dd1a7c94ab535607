"""Runs the demo over seeds and forget sets, and keeps its rows for the README's tables.

Command:  uv run python experiments/demo_seeds.py --data digits           (or --data fashion_mnist --seeds 0)
Time:     digits about 3 minutes on 2 cores; Fashion-MNIST about 20 for each seed.
Result:   experiments/results/demo_DATA.jsonl, one row for each model, without the histories.
"""

import argparse
import json
import shlex
from pathlib import Path

from rich.console import Console

from eupmu_jax.commands import demo

RESULTS = Path(__file__).parent / "results"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=["digits", "fashion_mnist"], default="digits")
    parser.add_argument("--forget", nargs="+", default=["class:3", "random:10%"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("eupmu_runs/seeds"))
    arguments = parser.parse_args()
    path = RESULTS / f"demo_{arguments.data}.jsonl"
    rows = []
    for forget in arguments.forget:
        for seed in arguments.seeds:
            out = arguments.out / f"{arguments.data}-{forget.replace(':', '-').rstrip('%')}-{seed}"
            rows += demo.run(arguments.data, forget, seed, out, Console())
    with path.open("w") as file:
        for row in rows:
            row.pop("history", None)
            # What regenerates the row; where the output went says nothing about it.
            chosen = ["--data", row["data"], "--forget", row["forget"], "--seeds", str(row["seed"])]
            row["command"] = shlex.join(["python", "experiments/demo_seeds.py", *chosen])
            file.write(json.dumps(row, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
