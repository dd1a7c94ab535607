"""Figures of a benchmark from its rows: trade-off, gaps with intervals, relearning curves, with a panel per case."""

from collections.abc import Collection
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from eupmu_jax.benchmark import designs, saved, summary
from eupmu_jax.benchmark.style import STYLE
from eupmu_jax.methods import METHODS

FAMILIES = {"EUPMU": "#0b6e4f", "aggregators": "#d9822b", "other methods": "#7a5bc7"}
ANCHORS = {"original": "#8a8f98", "retrained": "#111418"}
# Axes are linear up to here, in points, and logarithmic beyond: most methods are near, some very far.
LINEAR = 1.0
TICKS = (0, 1, 2, 5, 10, 20, 50, 100)
WIDTH = 4.6


def family(name: str) -> str:
    """The family of a line of `summary.lines_of`: EUPMU, aggregators or other methods."""
    return METHODS[name.split(", ")[0]].family


def color(name: str) -> str:
    """The colour of a method's family, or of the original or the retrained model."""
    return ANCHORS[name] if name in ANCHORS else FAMILIES[family(name)]


def draw(name: str, out: Path, folder: Path | None = None, seeds: Collection[int] = ()) -> list[Path]:
    """Writes `tradeoff`, `gaps` and `relearning` of a design as SVG; nothing if rows are missing.

    Args:
      name: Name of the design.
      out: Folder of `rows.jsonl`.
      folder: Folder for the figures; `out/figures` if None.
      seeds: Seeds to show; the design's if empty.
    """
    folder = folder or out / "figures"
    design = designs.of_seeds(name, seeds)
    found = saved.read(out / "rows.jsonl")
    shown = {case: summary.lines_of(found, name, design, case) for case in design.cases}
    shown = {case: lines for case, lines in shown.items() if len(lines) > 2}
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
            for axis, (case, lines) in zip(axes, shown.items(), strict=True):
                axis.set_title(case.forget.replace("class:{}", "a class"))
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
    """Error on the forget set and accuracy on the test set, relative to the retrained model."""
    target = next(line for line in lines if line.name == "retrained").figures
    point = lambda line: (line.figures["UA"] - target["UA"], line.figures["TA"] - target["TA"])
    for line in lines:
        star = line.name == "retrained"
        marker, size = ("*", 220) if star else ("s", 46) if line.name == "original" else ("o", 34)
        style = {"color": color(line.name), "marker": marker, "s": size, "edgecolor": "white", "zorder": 3 + star}
        axis.scatter(*point(line), **style)
    for scale, ticks in ((axis.set_xscale, axis.set_xticks), (axis.set_yscale, axis.set_yticks)):
        _near_and_far(scale, ticks, [*(-tick for tick in TICKS[:0:-1]), *TICKS])
    for limits, values in zip((axis.set_xlim, axis.set_ylim), zip(*map(point, lines), strict=True), strict=True):
        limits(min(-LINEAR, 1.3 * min(values)), max(LINEAR, 1.3 * max(values)))
    axis.tick_params(axis="x", labelsize=8)
    axis.set(xlabel="UA beyond the retrained model's, points", ylabel="TA beyond the retrained model's, points")
    methods = [line for line in lines if line.name not in ANCHORS]
    named = methods[:3] + [line for line in methods[3:] if line.name == "EUPMU budget"]
    on_axes = lambda line: axis.transAxes.inverted().transform(axis.transData.transform(point(line)))
    # From the highest point down, so that few lines cross and a name covers the lines that come from above.
    for index, line in enumerate(sorted(named, key=lambda line: -on_axes(line)[1])):
        place = (0.2, 0.94 - 0.06 * index)
        edge = (float(on_axes(line)[0] > place[0]), 0.5)
        axis.annotate(
            line.name,
            point(line),
            xytext=place,
            textcoords="axes fraction",
            fontsize=7,
            color=color(line.name),
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
            arrowprops={"arrowstyle": "-", "color": "#8a8f98", "lw": 0.6, "shrinkA": 0, "shrinkB": 3, "relpos": edge},
        )


def _gaps(axis, lines):
    """Mean gap of every method with its interval, and a tick at the median gap of its trials."""
    methods = [line for line in lines if line.name not in ANCHORS][::-1]
    for height, line in enumerate(methods):
        gap = np.nan_to_num(line.figures.get("gap", np.nan), nan=TICKS[-1])
        axis.barh(height, gap, color=color(line.name), height=0.72, alpha=1.0 if line.tied else 0.55)
        if line.gap:
            axis.plot([line.gap.low, line.gap.high], [height, height], color="#111418", lw=1.2)
        median = np.median(line.trials) if line.trials else np.nan
        axis.plot([median, median], [height - 0.36, height + 0.36], color="#8a8f98", lw=1.6)
    axis.set_yticks(range(len(methods)), [line.name for line in methods], fontsize=7)
    axis.grid(axis="y", visible=False)
    _near_and_far(axis.set_xscale, axis.set_xticks, TICKS)
    axis.set(xlim=(0, TICKS[-1]), ylim=(-0.6, len(methods) - 0.4))
    axis.set_xlabel("gap to the retrained model, points\n(line: 95 %; tick: median trial)")


def _relearning(axis, lines):
    """Accuracy on the forget set while training on retain data alone, which recovers what was only suppressed."""
    curve = lambda line: np.mean([row["relearning"]["retain_only"]["accuracy"] for row in line.rows], axis=0)
    target = curve(next(line for line in lines if line.name == "retrained"))
    ends = []
    for line in reversed(lines):
        beyond, steps = curve(line) - target, line.rows[0]["relearning"]["retain_only"]["step"]
        bold = line.name in ANCHORS or family(line.name) == "EUPMU"
        axis.plot(steps, beyond, color=color(line.name), lw=2.0 if bold else 0.8, alpha=1.0 if bold else 0.5)
        ends.extend(beyond)
    _near_and_far(axis.set_yscale, axis.set_yticks, [*(-tick for tick in TICKS[:0:-1]), *TICKS])
    axis.set_ylim(min(-LINEAR, 1.3 * min(ends)), max(LINEAR, 1.3 * max(ends)))
    axis.set(xlabel="steps on retain data", ylabel="accuracy on the forget set,\nbeyond the retrained model's")


def _near_and_far(scale, ticks, values):
    scale("symlog", linthresh=LINEAR, linscale=1.0)
    ticks(values, [f"{value:g}" for value in values])
    ticks([], minor=True)
