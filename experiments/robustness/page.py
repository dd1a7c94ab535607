"""The page of the random settings: which methods keep the limit, and their gaps, from `rows.jsonl`."""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from eupmu_jax.benchmark import rows
from experiments import parts
from experiments.budgets import page as budgets

ROWS = Path(__file__).with_name("rows.jsonl")
DATA = {"digits": "Digits", "fashion_mnist": "Fashion-MNIST"}
# A limit counts as kept if exceeded by at most this share of the budget.
KEPT = 0.01
COLORS = {
    "barrier": "#0b6e4f",
    "PI": "#1f77d0",
    "step tolerance, explicit": "#d9822b",
    "step tolerance, implicit": "#eab37a",
    "reference preset": "#b8468c",
    "fixed weight 1": "#c3c8d0",
    "fixed weight 3": "#8a8f98",
    "fixed weight 9": "#4b5058",
}
LABELS = {"reference preset": "released code"}


def blocks() -> dict[str, str]:
    """A table for each data set, and the sentences of the page of budgets."""
    found = rows.read(ROWS)
    made = {f"robustness {name}": table(rows.select(found, data=name)) for name in DATA}
    return made | {"budgets": in_short(rows.select(rows.read(budgets.ROWS), stage="grid"), found)}


def table(found: list[dict]) -> str:
    """By method, over random settings: limits kept, UA and gap after the last step and at the returned checkpoint."""
    lines = []
    for method in dict.fromkeys(row["method"] for row in found):
        mine, line = rows.select(found, method=method), [method]
        for end in ("last", "returned"):
            kept = [row for row in mine if _keeps(row, end)]
            line.append(f"{100 * len(kept) / len(mine):.0f}")
            line += [
                f"{np.nanmedian([parts.number(row[f'{name}_{end}']) for row in mine]):.2f}" for name in ("UA", "gap")
            ]
            line.append(f"{least_gap(kept, end):.2f}" if kept else "-")
        lines.append(line)
    head = [""]
    for end in ("last", "returned"):
        head += [f"{end}: limit kept, %", "median UA", "median gap", "least gap within the limit"]
    return parts.table(head, lines)


def least_gap(found: list[dict], end: str) -> float:
    """The smallest gap to the retrained model among the runs."""
    return min(parts.number(row[f"gap_{end}"]) for row in found)


def _keeps(row, end):
    return parts.number(row[f"overshoot_{end}"]) <= KEPT


def in_short(grid: list[dict], random: list[dict]) -> str:
    """The sentences on the grid of `budgets` and the random settings here."""
    steered = [row for row in grid if row["method"] in ("barrier", "PI")]
    over = sum(row["overshoot_returned"] > 0 for row in steered)
    last = max(row["overshoot_last"] for row in steered)
    released = sorted(row["overshoot_last"] for row in rows.select(grid, method="reference"))
    number = len({row["number"] for row in random})

    def kept(method, end):
        return f"{100 * np.mean([_keeps(row, end) for row in rows.select(random, method=method)]):.0f} %"

    return parts.paragraph(
        f"{over or 'None'} of {len(steered)} runs of barrier and PI (digits and Fashion-MNIST; SGD, Adam and Muon; 5 "
        f"seeds) returned above the limit. Their last steps ended at most {last:.1f} B above it, those of the released "
        f"code {np.median(released):.1f} B in the median and {released[-1]:.0f} B at worst. In {number} random "
        f"settings on each data set ([robustness](../robustness/page.md)), {kept('PI', 'returned')} keep the limit "
        f"with PI and the measured end (which helps any method). After the last step alone, {kept('PI', 'last')} do "
        f"with PI, "
        f"{kept('step tolerance, implicit', 'last')} with the paper's implicit step tolerance, "
        f"{kept('step tolerance, explicit', 'last')} with its explicit one, and {kept('fixed weight 1', 'last')} and "
        f"{kept('fixed weight 9', 'last')} with fixed weights of 1 and 9."
    )


def draw(folder: Path) -> None:
    """Draws how many of the random settings keep the limit, and how near they come to the retrained model."""
    with matplotlib.rc_context(parts.STYLE):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for panel, (data, name) in zip(panels, DATA.items(), strict=True):
            found = rows.select(rows.read(ROWS), data=data)
            for order, (method, color) in enumerate(COLORS.items()):
                mine = rows.select(found, method=method)
                last = {"marker": "o", "s": 40, "label": LABELS.get(method, method)}
                ends = {"last": last, "returned": {"marker": "D", "s": 26}}
                for end, style in ends.items():
                    kept = 100 * np.mean([_keeps(row, end) for row in mine])
                    gaps = [parts.number(row[f"gap_{end}"]) for row in mine]
                    low, middle, high = np.nanpercentile(gaps, [25, 50, 75])
                    panel.scatter(middle, kept, color=color, edgecolor="white", lw=0.6, zorder=20 - order, **style)
                    if end == "last":
                        panel.plot([low, high], [kept, kept], color=color, lw=1.2, alpha=0.6)
            panel.set(title=f"{name}, {len({row['number'] for row in found})} settings", ylim=(-4, 106))
            panel.set_xscale("log")
            panel.set_xlim(0.6, 100)
            panel.set_xticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
            panel.minorticks_off()
            panel.set_xlabel("median gap to the retrained model, points")
        panels[0].set_ylabel("runs that keep the limit, %")
        handles, labels = panels[0].get_legend_handles_labels()
        title = "circle: last step\n(line: quartiles)\ndiamond: measured end"
        figure.legend(handles, labels, loc="outside right", fontsize=8, title=title)
        parts.save(figure, folder / "robustness.svg")
