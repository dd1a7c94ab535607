"""The demo's page for a diffusion model: samples of every model from the same noise, a table, and the runs' losses."""

import html
from collections.abc import Mapping

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from eupmu_jax.benchmark.style import STYLE
from eupmu_jax.commands import picture
from eupmu_jax.commands.document import document, figures, made_by

COLUMNS = ("UA", "relearned", "RA", "FD", "rise", "limit", "time%")
LEGEND = (
    ("UA", "% of the samples for the forgotten class that a classifier of real digits takes for another"),
    ("relearned", "UA after retraining that class's row of the embedding, with everything else frozen"),
    ("RA", "% of the samples for the other classes that show the class asked for"),
    ("FD", "Frechet distance between the classifier's features of samples and of real digits, on the other classes"),
    ("rise", "of the denoising loss on the other classes, at the same noise; limit: how far EUPMU may let it rise"),
    ("time%", "preparation, steps and end, as a share of retraining"),
)
COLORS = {"EUPMU": "#0b6e4f", "weighted sum": "#d9822b"}
# Rows and columns of a class's samples.
SHOWN = (2, 3)


def cells(row: dict) -> list[str]:
    """The row's entries for `COLUMNS`, as text."""
    optional = lambda name, form: "-" if row.get(name) is None else format(row[name], form)
    figures = [f"{row[name]:.1f}" for name in ("UA", "relearned", "RA", "FD")]
    return [*figures, f"{row['rise']:+.4f}", optional("limit", ".4f"), optional("share_of_retraining", ".1f")]


def headline(rows: list[dict]) -> str:
    """How near EUPMU came to the retrained model, and at what cost."""
    of = {row["method"]: row for row in rows}
    ours, wanted = of["EUPMU"], of["retrained"]
    kept = "within" if ours["rise"] <= ours["limit"] else "beyond"
    return (
        f"Asked for the forgotten class, EUPMU draws another one in {ours['UA']:.1f} % of its samples; the retrained "
        f"model does so in {wanted['UA']:.1f} %. The loss on the others rose by {ours['rise']:.4f}, {kept} the limit "
        f"of {ours['limit']:.4f}. Retraining one row of the embedding brings the class back in all but "
        f"{ours['relearned']:.1f} % of the samples, in all but {wanted['relearned']:.1f} % of the retrained model's."
    )


def render(rows: list[dict], images: Mapping[str, np.ndarray]) -> str:
    """The page with its pictures embedded.

    Args:
      rows: As `demo_diffusion.run` writes them.
      images: Samples of each model, `(classes, 6, height, width)` in [-1, 1].
    """
    first = rows[0]
    title = html.escape(f"digits, a diffusion model: forget {first['forget']}, seed {first['seed']}")
    body = _PAGE.format(
        title=title,
        headline=html.escape(headline(rows)),
        figures=figures(rows, COLUMNS, cells, LEGEND, ["EUPMU"]),
        samples=picture.svg(grid(images, int(first["forget"].split(":")[1]))),
        timeline=picture.svg(timeline(rows)),
        provenance=made_by(first),
    )
    return document(f"eupmu demo: {title}", body)


def grid(images: Mapping[str, np.ndarray], forgotten: int) -> Figure:
    """A row of samples for each model, the forgotten class first; `images` as in `render`."""
    classes = len(next(iter(images.values())))
    order = [forgotten, *(label for label in range(classes) if label != forgotten)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.4, 0.78 * len(images) + 0.35), layout="constrained")
        for axes, (name, found) in zip(np.ravel(figure.subplots(len(images), 1)), images.items(), strict=True):
            blocks = [_block(found[label]) for label in order]
            axes.imshow(np.concatenate(blocks, axis=1), cmap="gray_r", vmin=-1, vmax=1, interpolation="nearest")
            width = blocks[0].shape[1]
            axes.axvline(width - 0.5, color="#b3261e", lw=1)
            axes.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
            places = (np.arange(classes) + 0.5) * width
            axes.set_xticks(places, [f"“{label}”" for label in order] if name == next(iter(images)) else [])
            axes.tick_params(top=True, bottom=False, labeltop=True, labelbottom=False, length=0)
            axes.set_yticks([])
            axes.grid(visible=False)
            axes.spines[:].set_visible(False)
        return figure


def timeline(rows: list[dict]) -> Figure:
    """Denoising losses of both sets over the steps, with EUPMU's target and limit, and the retrained model's losses."""
    runs = [row for row in rows if row.get("history")]
    (level,) = [row["level"] for row in runs if row.get("level")]
    retrained = next(row for row in rows if row["method"] == "retrained")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.4, 3.2), layout="constrained")
        forget, retain = figure.subplots(1, 2)
        for axes, name, title in ((forget, "forget_loss", "forgotten class"), (retain, "retain_loss", "other classes")):
            for row in runs:
                steps, values = row["history"]["step"], np.array(row["history"][name], float)
                wide = 2.2 if row["method"] == "EUPMU" else 1.2
                axes.plot(steps, values, color=COLORS[row["method"]], lw=wide, label=row["method"])
            axes.axhline(retrained[name], color="#111418", ls=":", lw=1.2, label="retrained")
            axes.set(title=f"denoising loss, {title}", xlabel="step")
        forget.axhline(level["target"], color="#0b6e4f", ls="--", lw=1, label="target")
        retain.axhline(level["limit"], color="#b3261e", ls="--", lw=1, label="limit")
        for axes in (forget, retain):
            axes.legend(fontsize=7.5)
        return figure


def _block(images):
    """The images of a class tiled in rows, with margins."""
    rows, columns = SHOWN
    padded = np.pad(images[: rows * columns], ((0, 0), (1, 1), (1, 1)), constant_values=-1)
    height, width = padded.shape[1:]
    tiled = padded.reshape(rows, columns, height, width).transpose(0, 2, 1, 3).reshape(rows * height, columns * width)
    return np.pad(tiled, ((0, 0), (3, 3)), constant_values=-1)


_PAGE = """<h1>A diffusion model forgets a digit</h1>
<p class="sub">{title}</p>
<p class="headline">{headline}</p>
<div class="figure">{samples}</div>
<p class="sub">Every model samples from the same noise, with 50 DDIM steps and guidance 2. Left of the red line: the
class to be forgotten.</p>
{figures}
<h2>Over time</h2>
<div class="figure">{timeline}</div>
<p class="sub">At fixed noise and times. Target: the loss on the forgotten images of the mean prediction for the other
classes. Dotted: the retrained model.</p>
<h2>What this page does not show</h2>
<p>There is one seed and one class, at 8 x 8 pixels. The Frechet distance uses the features of a small classifier and is
not FID. Retraining the row of the embedding is one attack; experiments/diffusion has six.</p>
<footer>{provenance}</footer>
"""
