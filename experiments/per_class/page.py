"""The page on who pays: damage to the worst class at equal UA, from `rows.jsonl`."""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from eupmu_jax.benchmark import rows
from experiments import parts

ROWS = Path(__file__).with_name("rows.jsonl")
COLORS = {
    "barrier, one": "#8fc4b1",
    "barrier, ten": "#0b6e4f",
    "PI, one": "#9cc7ee",
    "PI, ten": "#1f77d0",
    "owa": "#7a5bc7",
    "mean": "#8a8f98",
}
LABELS = {
    "barrier, one": "barrier, one limit on the mean",
    "barrier, ten": "barrier, a limit for each class",
    "PI, one": "PI, one limit on the mean",
    "PI, ten": "PI, a limit for each class",
    "owa": "ordered weighted average, fixed weight",
    "mean": "plain average, fixed weight",
}


def blocks() -> dict[str, str]:
    """The table."""
    return {"per class": table(rows.read(ROWS))}


def table(found: list[dict]) -> str:
    """By method and strength, over seeds: UA, and the cost in the mean and to the worst class."""
    lines = []
    for method, strength in dict.fromkeys((row["method"], row["strength"]) for row in found):
        mine = rows.select(found, method=method, strength=strength)
        figures = [
            f"{np.mean([row['UA'] for row in mine]):.1f}",
            f"{np.mean([np.mean(row['rises']) for row in mine]):.4f}",
            f"{np.mean([max(row['rises']) for row in mine]):.4f}",
            f"{np.mean([max(row['drops']) for row in mine]):.2f}",
        ]
        lines.append([method, f"{strength:g}", *figures])
    return parts.table(["", "B or weight", "UA", "mean rise", "worst class's rise", "worst class's fall in RA"], lines)


def draw(folder: Path) -> None:
    """Draws the damage to the worst class against how much is forgotten."""
    found = rows.read(ROWS)
    names = {
        "rises": "rise of the worst class's retain loss, nats",
        "drops": "fall of the worst class's accuracy, points",
    }
    with matplotlib.rc_context(parts.STYLE):
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        for panel, (name, title) in zip(figure.subplots(1, 2), names.items(), strict=True):
            for method, color in COLORS.items():
                mine = rows.select(found, method=method)
                worst = [max(row[name]) for row in mine]
                panel.scatter([row["UA"] for row in mine], worst, s=10, color=color, alpha=0.35, lw=0)
                by_strength = [rows.select(mine, strength=s) for s in sorted({row["strength"] for row in mine})]
                means = [
                    (np.mean([row["UA"] for row in some]), np.mean([max(row[name]) for row in some]))
                    for some in by_strength
                ]
                style = {"color": color, "lw": 1.6, "marker": "o", "ms": 4, "label": LABELS[method]}
                panel.plot(*zip(*sorted(means), strict=True), **style)
            panel.set(xlabel="UA, %", title=title)
        figure.axes[0].legend(fontsize=8)
        parts.save(figure, folder / "per_class.svg")
