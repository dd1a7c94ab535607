"""Runs the demo over seeds and forget sets and saves its rows.

Command:  uv run python experiments/demo/run.py --data digits             (or --data fashion_mnist --seeds 0)
Time:     digits about 3 minutes on 2 cores; Fashion-MNIST about 20 for each seed.
Result:   experiments/demo/rows.jsonl, one row for each model; only EUPMU's rows include the history.
"""

import argparse
from pathlib import Path

from rich.console import Console

from eupmu_jax.benchmark import rows
from eupmu_jax.commands import demo
from experiments import origin

ROWS = Path(__file__).with_name("rows.jsonl")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=["digits", "fashion_mnist"], default="digits")
    parser.add_argument("--forget", nargs="+", default=["class:3", "random:10%"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("eupmu_runs/seeds"))
    arguments = parser.parse_args()
    for forget in arguments.forget:
        for seed in arguments.seeds:
            out = arguments.out / f"{arguments.data}-{forget.replace(':', '-').rstrip('%')}-{seed}"
            made = demo.run(arguments.data, forget, seed, out, Console())
            case = {"data": arguments.data, "forget": forget, "seed": seed}
            # The command reproduces the row without --out, which does not affect it.
            command = origin.command(__file__, "--data", arguments.data, "--forget", forget, "--seeds", seed)
            for row in made:
                if row["method"] != "EUPMU":
                    row.pop("history", None)
                row["command"] = command
            others = [row for row in rows.read(ROWS) if not case.items() <= row.items()]
            rows.replace(ROWS, [*others, *made])


if __name__ == "__main__":
    main()
