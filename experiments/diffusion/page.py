"""The page of diffusion: each model's samples as a classifier sees them, from `rows.jsonl`."""

from pathlib import Path

import numpy as np

from eupmu_jax.benchmark import rows
from experiments import parts

ROWS = Path(__file__).with_name("rows.jsonl")
FIGURES = {"UA": 1, "UA_relearned": 1, "RA": 1, "FD": 2, "rise": 4, "forget_loss": 3, "share_of_retraining": 1}


def blocks() -> dict[str, str]:
    """The mean of each model over its seeds."""
    found = rows.read(ROWS)
    lines = []
    for model in dict.fromkeys(row["model"] for row in found):
        mine = rows.select(found, model=model)
        means = [(np.mean([row[name] for row in mine]) if name in mine[0] else None, d) for name, d in FIGURES.items()]
        lines.append([model, *("-" if mean is None else f"{mean:.{digits}f}" for mean, digits in means)])
    seeds = len({row["seed"] for row in found})
    head = ["UA", "after relearning", "RA", "FD", "rise", "forget loss", "% of retraining"]
    return {"diffusion": parts.table(["", *head], lines), "diffusion seeds": parts.paragraph(f"Seeds: {seeds}.")}
