"""The paths of runs from the original model to their end: a table, and a figure of utility against forget quality."""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from eupmu_jax.benchmark import rows
from experiments import parts
from experiments.persons import run, tune
from experiments.persons.compared import name_of, quality_of, rows_of
from experiments.persons.tune import KEPT

HEAD = [
    "least utility",
    "points that keep utility",
    "best quality of these",
    "after step",
    "quality at the end",
    "utility at the end",
]
# Panels beside each other.
COLUMNS = 4


def table(first: list[dict], saved: list[dict]) -> str:
    """For each method, how many points of its path keep the utility, and the best forget quality among them."""
    least = (1 - KEPT) * rows_of(first, ("original", ""))[0]["utility"]
    lines = []
    for key in _followed(saved):
        path = _path(first, saved, key)
        del path[0]
        kept = {step: quality for step, (utility, quality) in path.items() if utility >= least}
        best = max(kept, key=lambda step: kept[step], default=None)
        told = ["-", "-"] if best is None else [f"{kept[best]:.1f}", str(best)]
        utility, quality = path[run.STEPS]
        lowest = f"{min(utility for utility, _ in path.values()):.3f}"
        lines.append([name_of(key), lowest, f"{len(kept)} of {len(path)}", *told, f"{quality:.1f}", f"{utility:.3f}"])
    return parts.table(["", *HEAD], lines)


def draw(first: list[dict], saved: list[dict], file: Path) -> None:
    """Utility against forget quality along the run, in a panel for each method; it starts at the original model."""
    keys = _followed(saved)
    with matplotlib.rc_context(parts.STYLE):
        lines, columns = -(-len(keys) // COLUMNS), min(COLUMNS, len(keys))
        figure = Figure(figsize=(2.6 * columns, 2.9 * lines), layout="constrained")
        panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel()
        for axes, key in zip(panels, keys, strict=False):
            path = _path(first, saved, key)
            color = "#0b6e4f" if key[0] == "EUPMU" else "#5b6068"
            for other in keys:
                axes.plot(*zip(*_path(first, saved, other).values(), strict=True), color="#e2e5e9", lw=1, zorder=0)
            axes.plot(*zip(*path.values(), strict=True), "o-", color=color, ms=4, lw=1.5)
            for step in (0, max(path)):
                axes.annotate(str(step), path[step], (4, 4), textcoords="offset points", fontsize=8, color=color)
            axes.axvline((1 - KEPT) * rows_of(first, ("original", ""))[0]["utility"], color="#0b6e4f", ls="--", lw=1)
            axes.set_title(name_of(key), fontsize=9, loc="left")
        for axes in panels[len(keys) :]:
            axes.remove()
        for axes in panels[len(keys) - columns : len(keys)]:
            axes.tick_params(labelbottom=True)
        figure.supxlabel("model utility", fontsize=9)
        figure.supylabel("forget quality, log10 p", fontsize=9)
        parts.save(figure, file)


def _followed(saved):
    return [key for key in tune.TUNED if rows.select(saved, model=key[0], objective=key[1])]


def _path(first, saved, key):
    """Utility and forget quality at each step, the original model's at 0."""
    mine = {row["step"]: row for row in rows.select(saved, model=key[0], objective=key[1])}
    ends = {0: rows_of(first, ("original", ""))[0], run.STEPS: rows_of(first, key)[0]}
    return {step: (row["utility"], quality_of(first, row)) for step, row in sorted((mine | ends).items())}
