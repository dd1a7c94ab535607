"""Figures of a benchmark, from rows: trade-off, gaps with intervals, relearning curves; a panel for each setting."""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from eupmu_jax.benchmark import designs, rows, summary
from eupmu_jax.procedures import aggregated
from eupmu_jax.report import STYLE

FAMILIES = {"EUPMU": "#0b6e4f", "aggregators": "#d9822b", "other methods": "#7a5bc7"}
ANCHORS = {"original": "#8a8f98", "retrained": "#111418"}
# A bar beyond this gap is cut off: the methods that come near are what is compared.
LARGEST_GAP = 15.0
WIDTH = 4.6


def family(name: str) -> str:
    """EUPMU, an aggregator of gradients, or another method."""
    if name.startswith("EUPMU"):
        return "EUPMU"
    return "aggregators" if name in aggregated.METHODS else "other methods"


def color(name: str) -> str:
    """Of a method's family, or of the original or the retrained model."""
    return ANCHORS[name] if name in ANCHORS else FAMILIES[family(name)]


def draw(name: str, out: Path, folder: Path | None = None) -> list[Path]:
    """Writes `tradeoff`, `gaps` and `relearning` of a design as SVG; nothing if rows are missing.

    Args:
      name: Of the design.
      out: Folder of `rows.jsonl`.
      folder: Where the figures go; `out/figures` if None.
    """
    folder = folder or out / "figures"
    design = designs.design(name)
    taken, _ = summary.one_state(rows.read(out / "rows.jsonl"), rows.code())
    shown = {setting: summary.of(taken, name, design, setting) for setting in design.settings}
    shown = {setting: lines for setting, lines in shown.items() if len(lines) > 2}
    written = []
    for kind, panel, height in (
        ("tradeoff", _tradeoff, 4.2),
        ("gaps", _gaps, 1.2 + 0.17 * max(map(len, shown.values()), default=0)),
        ("relearning", _relearning, 3.4),
    ):
        if not shown:
            continue
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=(WIDTH * len(shown), height), layout="constrained")
            axes = figure.subplots(1, len(shown), squeeze=False)[0]
            for axis, (setting, lines) in zip(axes, shown.items(), strict=True):
                axis.set_title(setting.forget.replace("class:{}", "a class"))
                panel(axis, lines)
            handles = [matplotlib.lines.Line2D([], [], color=c, label=n, lw=3) for n, c in (ANCHORS | FAMILIES).items()]
            figure.legend(
                handles=handles, loc="outside lower center", ncols=3 if len(shown) == 1 else len(handles), frameon=False
            )
            path = folder / f"{name}-{kind}.svg"
            folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
            written.append(path)
    return written


def _tradeoff(axis, lines):
    """Error on the forget set against accuracy on the test set, around the retrained model."""
    target = next(line for line in lines if line.name == "retrained")
    point = lambda line: (line.figures["UA"], line.figures["TA"])
    for line in lines:
        star = line.name == "retrained"
        marker, size = ("*", 220) if star else ("s", 46) if line.name == "original" else ("o", 34)
        style = {"color": color(line.name), "marker": marker, "s": size, "edgecolor": "white", "zorder": 3 + star}
        axis.scatter(*point(line), **style)
    for line in [line for line in lines if line.name not in ANCHORS][:3]:
        axis.annotate(line.name, point(line), xytext=(5, 4), textcoords="offset points", fontsize=7)
    near = [point(line) for line in lines if abs(line.figures["TA"] - target.figures["TA"]) < LARGEST_GAP]
    axis.set_ylim(min(y for _, y in near) - 0.5, max(y for _, y in near) + 0.5)
    axis.set(xlabel="UA: error on the forget set, %", ylabel="TA: accuracy on the test set, %")


def _gaps(axis, lines):
    """Mean gap of every method with its interval, and a tick at the median gap of its trials."""
    methods = [line for line in lines if line.name not in ANCHORS][::-1]
    for height, line in enumerate(methods):
        gap = min(np.nan_to_num(line.figures["gap"], nan=np.inf), LARGEST_GAP)
        axis.barh(height, gap, color=color(line.name), height=0.72, alpha=1.0 if line.tied else 0.55)
        if line.gap and line.gap.low < LARGEST_GAP:
            axis.plot([line.gap.low, min(line.gap.high, LARGEST_GAP)], [height, height], color="#111418", lw=1.2)
        median = np.median(line.trials)
        if median < LARGEST_GAP:
            axis.plot([median, median], [height - 0.36, height + 0.36], color="#8a8f98", lw=1.6)
    axis.set_yticks(range(len(methods)), [line.name for line in methods], fontsize=7)
    axis.grid(axis="y", visible=False)
    axis.set(xlim=(0, LARGEST_GAP), ylim=(-0.6, len(methods) - 0.4))
    axis.set_xlabel("gap to the retrained model, points\n(line: 95 %; tick: median trial)")


def _relearning(axis, lines):
    """Accuracy on the forget set while retain data alone are learned: suppressed answers come back."""
    for line in reversed(lines):
        curves = [row["relearning"]["retain_only"] for row in line.rows]
        mean = np.mean([curve["accuracy"] for curve in curves], axis=0)
        anchor = line.name in ANCHORS
        bold = anchor or line.name.startswith("EUPMU")
        axis.plot(curves[0]["step"], mean, color=color(line.name), lw=2.0 if bold else 0.8, alpha=1.0 if bold else 0.5)
    axis.set(xlabel="steps on retain data", ylabel="accuracy on the forget set, %")
