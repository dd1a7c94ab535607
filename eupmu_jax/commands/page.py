"""One self-contained HTML page from the demo's rows, and the cells of its table."""

import html
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from eupmu_jax.benchmark.style import STYLE
from eupmu_jax.commands import picture
from eupmu_jax.commands.document import document, figures, made_by
from eupmu_jax.commands.picture import SMALLEST_LOSS

COLUMNS = ("UA", "RA", "TA", "MIA", "gap", "rise", "limit", "time%", "F", "B")
LEGEND = (
    ("UA", "100 - accuracy on the forget set; RA, TA: accuracy on the retain and on the test set; all in %"),
    ("MIA", "% of the forget set that an attack on confidences classifies as unseen; ideally the retrained value"),
    ("gap", "mean distance of UA, RA, TA and MIA to the retrained model: the smaller the better"),
    ("rise", "of the loss on the whole retain set, in nats; limit: of the rise, or of the retain error in points (pt)"),
    (
        "time%",
        "preparation, steps and end, as a share of retraining; F, B: forward and backward passes over the training set",
    ),
)
COLORS = {
    "original": "#8a8f98",
    "retrained": "#111418",
    "fine-tuning": "#9aa7b8",
    "gradient ascent": "#d9822b",
    "random labels": "#b8468c",
    "EUPMU": "#0b6e4f",
    "EUPMU explicit": "#7cc4a3",
    "EUPMU implicit": "#1f77d0",
    "EUPMU next-batch": "#6bb8e8",
}


def cells(row: dict) -> list[str]:
    """The row's entries for `COLUMNS`, as text."""
    number = lambda key, form: "-" if row.get(key) is None else format(row[key], form)
    return [
        *(number(key, ".1f") for key in ("UA", "RA", "TA", "MIA")),
        number("gap", ".2f"),
        number("rise", "+.4f" if abs(row["rise"] or 0) < 10 else "+.1f"),
        _limit(row),
        number("share_of_retraining", ".1f"),
        number("forward_passes", ".1f"),
        number("backward_passes", ".1f"),
    ]


def _limit(row):
    if row.get("allowed_rise") is not None:
        return format(row["allowed_rise"], ".4f")
    return f"{100 * row['level']['allowed']:.2f}pt" if row.get("level") else "-"


def of_level(reached: Any) -> dict | None:
    """The part of `Unlearned.level` that a row records."""
    if reached is None:
        return None
    return {
        "target": reached.target,
        "interval": None if reached.interval is None or reached.target == 1 else list(reached.interval),
        "limit": reached.limit,
        "allowed": reached.limit - reached.start,
        "kept": reached.kept,
    }


def sampling_error(rows: list[dict]) -> float:
    """Half the width of the 95 % interval of a gap, in points, due to the finite forget and test sets.

    It combines the errors of UA and MIA on the forget set and of TA on the test set, at the rates of the retrained
    model. UA and MIA share their examples, so their errors are added as fully correlated. One success and one failure
    are added to keep the rates away from 0 and 1.
    """

    def variance(name, count):
        rate = (rows[1][name] / 100 * count + 1) / (count + 2)
        return rate * (1 - rate) / count

    counts = rows[0]["examples"]
    forget = sum(variance(name, counts["forget"]) ** 0.5 for name in ("UA", "MIA"))
    total = forget**2 + variance("TA", counts["test"])
    return 100 * 1.96 * total**0.5 / 4


def best_of(rows: list[dict]) -> list[dict]:
    """The method with the least gap and those within the sampling error of it, nearest first."""
    ranked = sorted((row for row in rows[2:] if row["gap"] is not None), key=lambda row: row["gap"])
    return [row for row in ranked if row["gap"] <= ranked[0]["gap"] + sampling_error(rows)]


def headline(rows: list[dict]) -> str:
    """Names the method nearest to the retrained model, its ties, and the gap of the untouched model."""
    best, untouched = best_of(rows), rows[0]["gap"]
    if not best:
        return "No method ended with finite figures."
    names = [row["method"] for row in best]
    gaps = f"{best[0]['gap']:.2f}" + (f" to {best[-1]['gap']:.2f}" if len(best) > 1 else "")
    who = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    tie = f", a tie within the sampling error of {sampling_error(rows):.2f} points" if len(best) > 1 else ""
    text = (
        f"{who} come{'s' * (len(best) == 1)} nearest to the retrained model: an average gap of {gaps} points{tie}. The "
        f"untouched model has {untouched:.2f}."
    )
    if untouched <= best[0]["gap"] + sampling_error(rows):
        text += " This forget set is not informative: the original model treats it almost as the retrained one does."
    return text


def render(rows: list[dict]) -> str:
    """The page with its figures embedded; `rows` as `demo.run` writes them."""
    first = rows[0]
    title = html.escape(f"{first['data']}: forget {first['forget']}, seed {first['seed']}")
    body = _PAGE.format(
        title=title,
        headline=html.escape(headline(rows)),
        figures=figures(rows, COLUMNS, cells, LEGEND, [row["method"] for row in best_of(rows)], COLORS),
        gaps=picture.svg(_gaps(rows)),
        timeline=picture.svg(timeline(rows)),
        provenance=f"{made_by(first)} | split {first['split'][:12]}",
    )
    return document(f"eupmu demo: {title}", body)


def _gaps(rows):
    """Gap of every method, the sampling error around the least one, and the untouched model's."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.4, 3.2), layout="constrained")
        axes, losses = figure.subplots(1, 2, width_ratios=(3, 2))
        shown = [row for row in rows[2:] if row["gap"] is not None][::-1]
        heights = np.arange(len(shown))
        axes.barh(heights, [row["gap"] for row in shown], color=[COLORS[row["method"]] for row in shown], height=0.68)
        for height, row in zip(heights, shown, strict=True):
            axes.text(row["gap"], height, f" {row['gap']:.2f}", va="center", fontsize=8, color="#3b4048")
        axes.set_yticks(heights, [row["method"] for row in shown])
        axes.axvline(rows[0]["gap"], color=COLORS["original"], ls="--", lw=1)
        axes.annotate("untouched", (rows[0]["gap"], len(shown) - 0.4), fontsize=7.5, color=COLORS["original"])
        if shown:
            least = min(row["gap"] for row in shown)
            axes.axvspan(least, least + sampling_error(rows), color="#0b6e4f", alpha=0.1, lw=0, zorder=0)
        axes.grid(axis="y", visible=False)
        axes.set_axisbelow(True)
        axes.margins(x=0.1)
        axes.set_title("Gap to the retrained model, points (shaded: sampling error)")
        # A diverged run has no loss to plot.
        for row in (row for row in rows if None not in (row["forget_loss"], row["retain_loss"])):
            marker = {"original": "s", "retrained": "*"}.get(row["method"], "o")
            size, order = (170, 5) if marker == "*" else (44, 4)
            place = max(row["forget_loss"], SMALLEST_LOSS), max(row["retain_loss"], SMALLEST_LOSS)
            losses.scatter(*place, color=COLORS[row["method"]], marker=marker, s=size, zorder=order, edgecolor="white")
        losses.set(xscale="log", yscale="log", xlabel="loss on the forget set, nats", ylabel="on the retain set")
        losses.set_title("Losses: right is forgotten, down is kept")
        return figure


def timeline(rows: list[dict]) -> Figure:
    """The picture of all runs, EUPMU's on top; see `picture.of_runs`."""
    runs = sorted((row for row in rows if row.get("history")), key=lambda row: row["method"] != "EUPMU")
    (level,) = [row["level"] for row in runs if row.get("level")] or [None]
    retrained = rows[1]
    return picture.of_runs(
        {row["method"]: row["history"] for row in runs},
        COLORS,
        ends={row["method"]: row["returned"] for row in runs if row["returned"]},
        target=level and level["target"],
        interval=level and level["interval"],
        limit=level and level["limit"],
        retrained={
            "forget_error": retrained["UA"] / 100,
            "retain_error": 1 - retrained["RA"] / 100,
            "retain_loss": retrained["retain_loss"],
        },
    )


_PAGE = """<h1>Unlearning, side by side</h1>
<p class="sub">{title}</p>
<p class="headline">{headline}</p>
{figures}
<h2>Where the models end</h2>
<div class="figure">{gaps}</div>
<h2>Over time</h2>
<div class="figure">{timeline}</div>
<p class="sub">Errors and losses over time are measured on at most 2,000 examples of each set; lines may leave the
frame. Dotted: the retrained model. Dashed green: the error of the original model on data it never saw, with its 95 %
interval; EUPMU steers the forget set to it. Dashed red: the limit on EUPMU's retain error. The dot marks the returned
parameters: after the last step EUPMU also measures points on the path back and the average of the last parameters.</p>
<h2>What this page does not show</h2>
<p>This is one seed, one attack on confidences and one small model. A model that passes may still reveal the forgotten
data to a stronger attack, or relearn it quickly.</p>
<footer>{provenance}</footer>
"""
