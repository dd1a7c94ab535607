"""The page of TOFU: the memory of a step of its models, from the plans of `speed`; it has no rows of its own."""

from experiments import parts
from experiments.speed.page import FOLDER, store

MODELS = {"1b": "Llama 3.2 1B", "8b": "Llama 3.1 8B"}


def blocks() -> dict[str, str]:
    """The plans of models that TOFU is used with."""
    return {"tofu fits": fits(store.read(FOLDER / "plans.jsonl"))}


def fits(rows: list[dict]) -> str:
    """Memory of a chip in a step of each planned model."""
    lines = [
        [
            f"{MODELS[row['model']]}, {row['parameters'] / 1e9:.1f} billion",
            f"adapters of rank {row['adapters']}" if row.get("adapters") else "all parameters",
            f"{row['topology']}, {row['mesh']['data']} x {row['mesh']['tensor']}",
            f"{row['batch'][0]}+{row['batch'][1]} x {row['sequence']:,}",
            f"{row['bytes'] / 1e9:.1f} of {row['limit_bytes'] / 1e9:.0f}",
        ]
        for row in rows
        if row["model"] in MODELS
    ]
    return parts.table(["sizes of", "trained", "slice, data x tensor", "sequences x tokens", "GB of a chip"], lines)
