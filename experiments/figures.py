"""The figures of the documents, from saved rows.

Command:  uv run python experiments/figures.py
Time:     seconds.
Result:   experiments/figures/*.svg.
"""

from pathlib import Path

import benchmark_tables
import matplotlib
import numpy as np
from rows import read

from eupmu_jax.benchmark.figures import draw as draw_benchmark

matplotlib.use("svg")
import matplotlib.pyplot as plt

FIGURES = Path(__file__).parent / "figures"
COLORS = {
    "barrier": "#0b6e4f",
    "guard": "#6fbf73",
    "PI": "#1f77d0",
    "I": "#6bb8e8",
    "PHR": "#7a5bc7",
    "P": "#d9822b",
    "reference": "#b8468c",
    "step tolerance, explicit": "#d9822b",
    "step tolerance, implicit": "#eab37a",
    "reference preset": "#b8468c",
    "fixed weight 1": "#c3c8d0",
    "fixed weight 3": "#8a8f98",
    "fixed weight 9": "#4b5058",
    "barrier, one": "#8fc4b1",
    "barrier, ten": "#0b6e4f",
    "PI, one": "#9cc7ee",
    "PI, ten": "#1f77d0",
    "owa": "#7a5bc7",
    "mean": "#8a8f98",
}
LABELS = {
    "P": "P (the paper)",
    "reference": "released code",
    "reference preset": "released code",
    "barrier, one": "barrier, one limit on the mean",
    "barrier, ten": "barrier, a limit for each class",
    "PI, one": "PI, one limit on the mean",
    "PI, ten": "PI, a limit for each class",
    "owa": "ordered weighted average, fixed weight",
    "mean": "plain average, fixed weight",
}
OPTIMIZERS = {"sgd": "SGD", "adam": "Adam", "muon": "Muon"}
STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#b0b5bd",
    "axes.grid": True,
    "axes.labelcolor": "#3b4048",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "font.family": "sans-serif",
    "font.size": 9,
    "grid.color": "#eceef1",
    "legend.frameon": False,
    "savefig.bbox": "tight",
    "svg.hashsalt": "eupmu_jax",
    "xtick.color": "#6b7078",
    "ytick.color": "#6b7078",
}


def label(method: str) -> str:
    return LABELS.get(method, method)


def budgets():
    """Above, the loss of the whole retain set over time; below, where every run ends."""
    rows = [row for row in read("budgets_fashion_mnist") if row["stage"] == "grid"]
    shown = [
        r for r in rows if r["forget"].startswith("random") and (r["scale"] == "raw" or r["method"] == "reference")
    ]
    shown = [row for row in shown if row["schedule"] == "linear"]
    figure, axes = plt.subplot_mosaic([list(OPTIMIZERS), ["ends"] * 3], figsize=(9, 6.2), layout="constrained")
    for optimizer, name in OPTIMIZERS.items():
        panel = axes[optimizer]
        for method, color in COLORS.items():
            traces = [r["trace"] for r in shown if (r["method"], r["optimizer"]) == (method, optimizer)]
            if traces:
                used = [(np.array(trace) - trace[0]) / rows[0]["rise"] for trace in traces]
                time = np.linspace(0, 1, len(traces[0]))
                panel.plot(time, np.median(used, axis=0), color=color, lw=1.6, label=label(method))
        limit_axis(panel)
        seeds = {row["seed"] for row in shown}
        panel.set(title=f"{name}, median of {len(seeds)} seeds", xlabel="share of the run")
    axes["sgd"].set_ylabel("rise of the retain loss / B")
    methods = [method for method in COLORS if any(row["method"] == method for row in rows)]
    axes["muon"].legend(loc="upper right", ncols=2, fontsize=8, handlelength=1.2, columnspacing=1)

    panel, rng = axes["ends"], np.random.default_rng(0)
    for place, method in enumerate(methods):
        found = [row for row in rows if row["method"] == method]
        for end, shift, style in (("last", -0.2, {"alpha": 0.35}), ("returned", 0.2, {"alpha": 0.9, "marker": "D"})):
            values = [1 + row[f"overshoot_{end}"] for row in found]
            x = place + shift + rng.uniform(-0.09, 0.09, len(values))
            panel.scatter(x, values, s=14, color=COLORS[method], lw=0, **style)
    limit_axis(panel)
    panel.set_xticks(range(len(methods)), [label(method) for method in methods])
    panel.set_ylabel("rise of the retain loss / B")
    panel.set_title(f"All {len(rows)} runs: after the last step (circles), and the checkpoint returned (diamonds)")
    save(figure, "budgets")


def limit_axis(panel):
    """Linear up to twice the budget, logarithmic beyond."""
    panel.axhline(1, color="#111418", lw=1, ls="--")
    panel.set_yscale("symlog", linthresh=2, linscale=1.2)
    panel.set_ylim(-0.3, 3e3)
    ticks = {0: "0", 1: "limit", 10: "10", 100: "100", 1000: "1000"}
    panel.set_yticks(list(ticks), list(ticks.values()))
    panel.minorticks_off()


def robustness():
    """How many of the random settings keep the limit, and how near they come to the retrained model."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for panel, (data, name) in zip(panels, {"digits": "Digits", "fashion_mnist": "Fashion-MNIST"}.items(), strict=True):
        rows = read(f"robustness_{data}")
        for order, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
            found = [row for row in rows if row["method"] == method]
            ends = {"last": {"marker": "o", "s": 40, "label": label(method)}, "returned": {"marker": "D", "s": 26}}
            for end, style in ends.items():
                kept = 100 * np.mean([row[f"overshoot_{end}"] <= 0.01 for row in found])
                low, middle, high = np.nanpercentile([row[f"gap_{end}"] for row in found], [25, 50, 75])
                panel.scatter(middle, kept, color=COLORS[method], edgecolor="white", lw=0.6, zorder=20 - order, **style)
                if end == "last":
                    panel.plot([low, high], [kept, kept], color=COLORS[method], lw=1.2, alpha=0.6)
        panel.axhline(95, color="#111418", lw=1, ls="--")
        panel.set(title=f"{name}, {len({row['number'] for row in rows})} settings", ylim=(-4, 106))
        panel.set_xscale("log")
        panel.set_xlim(0.6, 100)
        panel.set_xticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
        panel.minorticks_off()
        panel.set_xlabel("gap to the retrained model, median")
    panels[0].set_ylabel("runs that keep the limit, %")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right", fontsize=8, title="circle: last step\ndiamond: measured end")
    save(figure, "robustness")


def per_class():
    """What the worst class loses against how much is forgotten."""
    rows = read("per_class")
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    names = {
        "rises": "rise of the worst class's retain loss, nats",
        "drops": "fall of the worst class's accuracy, points",
    }
    for panel, (name, title) in zip(panels, names.items(), strict=True):
        for method in dict.fromkeys(row["method"] for row in rows):
            found = [row for row in rows if row["method"] == method]
            worst = lambda row, name=name: max(row[name])
            panel.scatter(
                [r["UA"] for r in found], [worst(r) for r in found], s=10, color=COLORS[method], alpha=0.35, lw=0
            )
            strengths = sorted({row["strength"] for row in found})
            means = [
                (
                    np.mean([r["UA"] for r in found if r["strength"] == s]),
                    np.mean([worst(r) for r in found if r["strength"] == s]),
                )
                for s in strengths
            ]
            panel.plot(
                *zip(*sorted(means), strict=True), color=COLORS[method], lw=1.6, marker="o", ms=4, label=label(method)
            )
        panel.set(xlabel="UA, %", title=title)
    panels[0].legend(fontsize=8)
    save(figure, "per_class")


def save(figure, name):
    FIGURES.mkdir(exist_ok=True)
    figure.savefig(FIGURES / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)


def main():
    with plt.rc_context(STYLE):
        budgets()
        robustness()
        per_class()
    for name in benchmark_tables.SHOWN:
        draw_benchmark(name, benchmark_tables.FOLDER, FIGURES)


if __name__ == "__main__":
    main()
