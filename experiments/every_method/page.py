"""The page with one row of every method, from `rows.jsonl`."""

from pathlib import Path

from eupmu_jax.benchmark import rows
from eupmu_jax.methods import METHODS
from experiments import parts

ROWS = Path(__file__).with_name("rows.jsonl")


def blocks() -> dict[str, str]:
    """The table."""
    return {"every method": table(rows.read(ROWS))}


def table(found: list[dict]) -> str:
    """Both losses before and after, and how far the parameters moved, by the current version of every method."""
    lines = []
    for name, method in METHODS.items():
        for row in rows.select(found, method=name, method_version=method.version):
            losses = [f"{value:.4f}" for value in row["forget_loss"] + row["retain_loss"]]
            lines.append([name, str(method.version), *losses, f"{row['change']:.4f}"])
    return parts.table(["", "version", "forget loss", "after", "retain loss", "after", "change"], lines)
