"""The page of the passages: what a small language model still has memorised, from `rows.jsonl`."""

from pathlib import Path

import numpy as np

from eupmu_jax.benchmark import rows
from experiments import parts

ROWS = Path(__file__).with_name("rows.jsonl")
PARTS = ("forget", "retain", "held_out")


def blocks() -> dict[str, str]:
    """The table, and one passage as each model continues it."""
    found = parts.newest(rows.read(ROWS), "model", "seed")
    return {"passages": table(found), "passage": samples(found)}


def table(found: list[dict]) -> str:
    """Exact memorisation by model, mean over seeds."""
    lines = []
    for model in dict.fromkeys(row["model"] for row in found):
        mine = rows.select(found, model=model)
        mean = lambda name, mine=mine: np.mean([parts.number(row.get(name)) for row in mine])
        cells = [f"{mean(f'{part}_memorised'):.1f}" for part in PARTS]
        cells += ["" if np.isnan(mean(name)) else f"{mean(name):{form}}" for name, form in OTHER.items()]
        lines.append([model, *cells])
    seeds = len({row["seed"] for row in found})
    head = [
        f"exact memorisation, %, {seeds} seed{'s' * (seeds > 1)}",
        "forget",
        "retain",
        "never seen",
        "time, %",
        "way kept",
    ]
    return parts.table(head, lines)


OTHER = {"share_of_retraining": ".1f", "share": ".2f"}


def samples(found: list[dict]) -> str:
    """A forgotten passage, and each model's continuation of its beginning, on the first seed."""
    first = rows.select(found, seed=found[0]["seed"])
    lines = [["the passage", f"`{first[0]['passage']}`"], *([row["model"], f"`{row['sample']}`"] for row in first)]
    return parts.table(["", "first 24 bytes given, the rest continued greedily"], lines)
