"""The page of compute: the gap against the passes that a run may take, from `rows.jsonl`."""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from eupmu_jax.benchmark import rows
from experiments import parts
from experiments.compute.run import PROBLEMS, RATES, ROWS, SHARES, TUNED, TUNING_SEED, UNTUNED

OURS = UNTUNED[0]
OPTIMIZERS = {"adam": "Adam", "sgd": "SGD", "muon": "Muon"}
COLORS = {OURS: "#0b6e4f", "EUPMU": "#6fbf73"}
OTHERS = ("#1f77d0", "#d9822b", "#b8468c", "#7a5bc7", "#8c6d46", "#c23b3b", "#4b5563", "#3aa6a6")


def blocks() -> dict[str, str]:
    """A table of gaps, one by optimizer, and what they say."""
    made = {}
    for problem in PROBLEMS:
        found = rows.select(rows.read(ROWS), problem=problem)
        if not found:
            continue
        made[f"compute {problem}"] = gaps(found)
        made[f"compute {problem} optimizers"] = by_optimizer(found)
        made[f"compute {problem} said"] = parts.paragraph(said(found))
    return made


def chosen(found: list[dict], method: str, share: float, optimizer: str | None = None) -> list[dict]:
    """The runs of a method at a budget: with the optimizer of the best blind score, or with the given one."""
    if method in UNTUNED:
        return rows.select(found, method=method, share=share)
    mine = rows.select(found, method=method, share=share)
    trials = [row for row in mine if row["seed"] == TUNING_SEED and optimizer in (None, row["optimizer"])]
    if len(trials) < len(RATES[next(iter(RATES))]) * (1 if optimizer else len(RATES)):
        return []
    best = min(trials, key=lambda row: parts.number(row["blind"]))
    return [
        row for row in rows.select(mine, optimizer=best["optimizer"], rate=best["rate"]) if row["seed"] != TUNING_SEED
    ]


def mean(some: list[dict], seeds=None) -> float:
    """The mean gap, over these seeds if any are named; NaN unless there are rows of all."""
    some = [row for row in some if seeds is None or row["seed"] in seeds]
    return float(np.mean([row["gap"] for row in some])) if some else np.nan


def common(found: list[dict]) -> list[int]:
    """The seeds that every method has."""
    of = lambda method: {row["seed"] for row in rows.select(found, method=method)} - {TUNING_SEED}
    return sorted(set.intersection(*(of(method) for method in (*UNTUNED, *TUNED))))


def shown(value: float) -> str:
    """A gap in a table."""
    return "-" if np.isnan(value) else f"{value:.2f}"


def gaps(found: list[dict]) -> str:
    """Methods by budgets, over the seeds that all have; the least gap of each budget with a star."""
    seeds, lines = common(found), []
    table = {m: [mean(chosen(found, m, share), seeds) for share in SHARES] for m in (*UNTUNED, *TUNED)}
    least = np.nanmin(list(table.values()), axis=0)
    for method, values in table.items():
        name = f"{method}, untuned" if method in UNTUNED else method
        lines.append([name] + [shown(v) + "*" * bool(v == low) for v, low in zip(values, least, strict=True)])
    return parts.table([""] + [f"{share:g} %" for share in SHARES], lines)


def by_optimizer(found: list[dict]) -> str:
    """Each tuned method with each optimizer."""
    seeds, lines = common(found), []
    for method in TUNED:
        for optimizer, name in OPTIMIZERS.items():
            values = [mean(chosen(found, method, share, optimizer), seeds) for share in SHARES]
            lines.append([f"{method}, {name}", *map(shown, values)])
    return parts.table([""] + [f"{share:g} %" for share in SHARES], lines)


def said(found: list[dict]) -> str:
    """Where EUPMU transport is nearest, with its seeds, its cost in time, and what it costs the retain set."""
    seeds = common(found)
    nearest = []
    for share in SHARES:
        ours = mean(chosen(found, OURS, share), seeds)
        others = [mean(chosen(found, m, share), seeds) for m in ("EUPMU", *TUNED)]
        if ours <= np.nanmin(others):
            nearest.append(f"{share:g}")
    ours = rows.select(found, method=OURS)
    of_all = {share: [row["gap"] for row in ours if row["share"] == share] for share in SHARES}
    listed = ", ".join(f"{np.mean(v):.2f} at {share:g} % ({min(v):.2f} to {max(v):.2f})" for share, v in of_all.items())
    original = np.mean([row["gap_of_original"] for row in ours])
    at = [row for row in ours if row["share"] == 5.0]
    time = np.median([row["seconds_of_retraining"] for row in at])
    adam = np.median([row["seconds_of_retraining"] for row in rows.select(found, share=5.0, optimizer="adam")])
    budgets = f"budgets of {', '.join(nearest)} %" if nearest else "no budget"
    every, number = len(TUNED) + len(UNTUNED), len({row["seed"] for row in ours})
    return (
        f"Untuned EUPMU transport has the least mean gap of all {every} methods at {budgets} of the passes of "
        f"retraining (seeds {', '.join(map(str, seeds))}). Over its {number} seeds its gap is {listed}; "
        f"that of the original model is {original:.2f}. In processor time its 5 % of the passes are {time:.0f} % of "
        f"retraining on this machine, and those of methods with Adam {adam:.0f} % (medians, with compilation): with so "
        "small a batch the matrix products of Muon cost more than the gradient."
    )


def draw(folder: Path) -> None:
    """The gap against the share of the passes of retraining."""
    found = rows.select(rows.read(ROWS), problem="mlp")
    seeds = common(found)
    with matplotlib.rc_context(parts.STYLE):
        figure = Figure(figsize=(7.2, 3.8), layout="constrained")
        axis = figure.subplots()
        colors = COLORS | dict(zip(TUNED, OTHERS, strict=True))
        ends = []
        original = np.mean([row["gap_of_original"] for row in found if row["seed"] in seeds])
        for method in (*TUNED, "EUPMU", OURS):
            values = [mean(chosen(found, method, share), seeds) for share in SHARES]
            ours = method == OURS
            axis.plot(SHARES, values, "o-", color=colors[method], lw=2.8 if ours else 1.2, ms=5 if ours else 3)
            # A line that leaves the figure is named where it does.
            ends.append((min(values[-1], 1.02 * original), method))
        axis.axhline(original, color="0.6", lw=1, ls="--")
        axis.text(SHARES[0], original, "original model", va="bottom", color="0.4", fontsize=8)
        axis.set(xscale="log", ylim=(0, original * 1.12), xlim=(SHARES[0] * 0.9, SHARES[-1] * 1.1))
        axis.set_xticks(SHARES, [f"{share:g} %" for share in SHARES], minor=False)
        axis.minorticks_off()
        axis.set(xlabel="passes, in % of those of retraining", ylabel="gap to the retrained model, points")
        # Names beside the ends of the lines, pushed apart where they would overlap.
        last = -np.inf
        for value, method in sorted(ends):
            last = max(value, last + original * 0.055)
            name = f"{method}, untuned" if method in UNTUNED else method
            weight = "bold" if method == OURS else "normal"
            axis.annotate(
                name,
                (SHARES[-1], value),
                (SHARES[-1] * 1.18, last),
                color=colors[method],
                weight=weight,
                fontsize=8,
                va="center",
                annotation_clip=False,
                arrowprops={"arrowstyle": "-", "lw": 0.5, "color": colors[method]},
            )
        parts.save(figure, folder / "compute.svg")
