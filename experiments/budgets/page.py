"""The page of the budgets: where runs end, what they return and how much they forget, from `rows.jsonl`."""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from eupmu_jax.benchmark import rows
from experiments import parts

ROWS = Path(__file__).with_name("rows.jsonl")
DATA = ("digits", "fashion_mnist")
METHODS = ("barrier", "guard", "PI", "I", "PHR", "P", "reference")
OPTIMIZERS = {"sgd": "SGD", "adam": "Adam", "muon": "Muon"}
COLORS = {
    "barrier": "#0b6e4f",
    "guard": "#6fbf73",
    "PI": "#1f77d0",
    "I": "#6bb8e8",
    "PHR": "#7a5bc7",
    "P": "#d9822b",
    "reference": "#b8468c",
}
LABELS = {"P": "P (the paper)", "reference": "released code"}


def blocks() -> dict[str, str]:
    """For each data set: the models, a table for each forget set, loss scale and schedule, and the other stages."""
    made = {}
    for name in DATA:
        found = rows.select(rows.read(ROWS), data=name)
        kinds: dict[str, list[dict]] = {}
        for row in rows.select(found, stage="grid"):
            log = " log" if row["scale"] == "log" and row["schedule"] == "linear" else ""
            restarts = " restarts" if row["schedule"] == "restarts" else ""
            kinds.setdefault(f"budgets {name} {row['forget']}{log}{restarts}", []).append(row)
            if row["method"] == "reference" and log:
                kinds.setdefault(f"budgets {name} {row['forget']}", []).append(row)
        kinds.pop(f"budgets {name} class:3 log", None)
        made |= {kind: table(some) for kind, some in kinds.items()}
        for stage in ("anchored", "cnn"):
            if some := rows.select(found, stage=stage):
                made[f"{stage} {name}"] = table(some)
        made[f"models {name}"] = models(rows.select(found, stage="models"))
    return made


def table(found: list[dict]) -> str:
    """By method and optimizer, over seeds."""
    lines = []
    for method in METHODS:
        mine = rows.select(found, method=method)
        if not mine:
            continue
        by_optimizer = {optimizer: rows.select(mine, optimizer=optimizer) for optimizer in OPTIMIZERS}
        # Ordered by optimizer, as the last digit of a mean depends on the order.
        mine = [row for group in by_optimizer.values() for row in group]
        lines.append(
            [
                method,
                *(f"{max(row['overshoot_last'] for row in group):+.2f}" for group in by_optimizer.values()),
                f"{100 * np.mean([row['inside'] for row in mine]):.0f}",
                f"{max(row['overshoot_returned'] for row in mine):+.3f}",
                *(f"{np.mean([row['UA_returned'] for row in group]):.1f}" for group in by_optimizer.values()),
                f"{np.mean([row['RA_returned'] for row in mine]):.2f}",
            ]
        )
    names = list(OPTIMIZERS.values())
    head = ["", *(f"last, {name}" for name in names), "inside, %", "returned", *(f"UA, {name}" for name in names), "RA"]
    return parts.table(head, lines)


def models(found: list[dict]) -> str:
    """Figures of the original and the retrained model, means over seeds."""
    lines = []
    figures = {"UA": 1, "RA": 2, "TA": 1, "MIA": 1, "retain_loss": 4}
    for forget, model in dict.fromkeys((row["forget"], row["model"]) for row in found):
        mine = rows.select(found, forget=forget, model=model)
        means = (f"{np.mean([row[name] for row in mine]):.{digits}f}" for name, digits in figures.items())
        lines.append([forget, model, *means])
    return parts.table(["forget", "model", "UA", "RA", "TA", "MIA", "retain loss"], lines)


def draw(folder: Path) -> None:
    """Draws the loss on the whole retain set over time, and below it where every run ends."""
    grid = rows.select(rows.read(ROWS), data="fashion_mnist", stage="grid")
    shown = [r for r in rows.select(grid, forget="random:10%", schedule="linear") if _is_usual(r)]
    with matplotlib.rc_context(parts.STYLE):
        figure = Figure(figsize=(8.6, 5.8), layout="constrained")
        axes = figure.subplot_mosaic([list(OPTIMIZERS), ["ends"] * 3])
        for optimizer, name in OPTIMIZERS.items():
            panel = axes[optimizer]
            for method, color in COLORS.items():
                traces = [row["trace"] for row in rows.select(shown, method=method, optimizer=optimizer)]
                used = [(np.array(trace) - trace[0]) / grid[0]["rise"] for trace in traces]
                time = np.linspace(0, 1, len(traces[0]))
                panel.plot(time, np.median(used, axis=0), color=color, lw=1.6, label=LABELS.get(method, method))
            _limit_axis(panel)
            seeds = {row["seed"] for row in shown}
            panel.set(title=f"{name}, median of {len(seeds)} seeds", xlabel="share of the run")
        axes["sgd"].set_ylabel("rise of the retain loss / B")
        axes["muon"].legend(loc="upper right", ncols=2, fontsize=8, handlelength=1.2, columnspacing=1)
        _ends(axes["ends"], grid)
        parts.save(figure, folder / "budgets.svg")


def _is_usual(row):
    return row["scale"] == "raw" or row["method"] == "reference"


def _ends(panel, grid):
    rng = np.random.default_rng(0)
    for place, (method, color) in enumerate(COLORS.items()):
        found = rows.select(grid, method=method)
        for end, shift, alpha, cap in (("last", -0.2, 0.4, "round"), ("returned", 0.2, 0.9, "projecting")):
            values = [1 + row[f"overshoot_{end}"] for row in found]
            x = place + shift + rng.uniform(-0.09, 0.09, len(values))
            # All points as one path of strokes without length: the file is a tenth of that with single markers.
            strokes = np.array([x, x, np.full_like(x, np.nan)]).T.ravel(), np.repeat(values, 3)
            panel.plot(*strokes, color=color, alpha=alpha, lw=3.4, solid_capstyle=cap)
    _limit_axis(panel)
    panel.set_xticks(range(len(COLORS)), [LABELS.get(method, method) for method in COLORS])
    panel.set_ylabel("rise of the retain loss / B")
    panel.set_title(f"All {len(grid)} runs: after the last step (left, round), and the checkpoint returned (right)")


def _limit_axis(panel):
    """Linear up to twice the budget, logarithmic beyond."""
    panel.axhline(1, color="#111418", lw=1, ls="--")
    panel.set_yscale("symlog", linthresh=2, linscale=1.2)
    panel.set_ylim(-0.3, 3e3)
    ticks = {0: "0", 1: "limit", 10: "10", 100: "100", 1000: "1000"}
    panel.set_yticks(list(ticks), list(ticks.values()))
    panel.minorticks_off()
