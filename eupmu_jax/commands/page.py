"""One self-contained HTML page from the demo's rows, and the cells of its table."""

import html
import io

import matplotlib
from matplotlib.figure import Figure

from eupmu_jax.benchmark.style import STYLE

COLUMNS = ("UA", "RA", "TA", "MIA", "gap", "rise", "limit", "time%", "F", "B")
LEGEND = (
    ("UA", "100 - accuracy on the forget set, RA and TA accuracy on the retain and test set, in %"),
    ("MIA", "% of the forget set that an attack on confidences takes for never seen; the aim is the retrained value"),
    ("gap", "mean distance of UA, RA, TA and MIA to the retrained model: the smaller the better"),
    ("rise", "of the loss on the whole retain set over the original model's; limit: what tolerance allows in all"),
    ("time%", "steps alone, as a share of retraining; F, B: forward and backward passes over the training set"),
)
COLORS = {
    "original": "#8a8f98",
    "retrained": "#111418",
    "fine-tuning": "#9aa7b8",
    "gradient ascent": "#d9822b",
    "random labels": "#b8468c",
    "EUPMU explicit": "#0b6e4f",
    "EUPMU implicit": "#1f77d0",
    "EUPMU next-batch": "#6bb8e8",
}
# A loss of 0 has no place on a logarithmic axis.
SMALLEST_LOSS = 1e-6


def cells(row: dict) -> list[str]:
    """The row's entries under `COLUMNS`, as text."""
    number = lambda key, form: "-" if row.get(key) is None else format(row[key], form)
    return [
        *(number(key, ".1f") for key in ("UA", "RA", "TA", "MIA")),
        number("gap", ".2f"),
        number("rise", "+.4f" if abs(row["rise"] or 0) < 10 else "+.1f"),
        number("allowed_rise", ".4f"),
        number("share_of_retraining", ".1f"),
        number("forward_passes", ".1f"),
        number("backward_passes", ".1f"),
    ]


def render(rows: list[dict]) -> str:
    """The page, with its figures inside; `rows` as `demo.run` writes them."""
    first = rows[0]
    best = min((row for row in rows[2:] if row["gap"] is not None), key=lambda row: row["gap"])
    table_rows = []
    for row in rows:
        entries = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells(row))
        swatch = f'<i style="background:{COLORS[row["method"]]}"></i>'
        kind = ' class="best"' if row is best else ' class="anchor"' if row in rows[:2] else ""
        table_rows.append(f"<tr{kind}><th>{swatch}{html.escape(row['method'])}</th>{entries}</tr>")
    legend = "".join(f"<dt>{html.escape(term)}</dt><dd>{html.escape(text)}</dd>" for term, text in LEGEND)
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    return _PAGE.format(
        title=html.escape(f"{first['data']}: forget {first['forget']}, seed {first['seed']}"),
        headline=html.escape(
            f"{best['method']} comes nearest to the retrained model: an average gap of {best['gap']:.2f} points, for "
            f"{best['share_of_retraining']:.1f} % of the time that retraining took."
        ),
        head="".join(f"<th>{name}</th>" for name in COLUMNS),
        body="\n".join(table_rows),
        legend=legend,
        tradeoff=_tradeoff(rows),
        timeline=_timeline(rows),
        provenance=html.escape(f"{first['command']} | {versions} | {first['device']} | split {first['split'][:12]}"),
    )


def _svg(figure):
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _tradeoff(rows):
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.4, 4.3), layout="constrained")
        accuracy, losses = figure.subplots(1, 2)
        for row in rows:
            color, marker = COLORS[row["method"]], {"original": "s", "retrained": "*"}.get(row["method"], "o")
            size, order = (200, 5) if marker == "*" else (56, 4)
            style = {"color": color, "marker": marker, "s": size, "zorder": order, "edgecolor": "white"}
            accuracy.scatter(row["UA"], row["RA"], label=row["method"], **style)
            losses.scatter(*_losses(row), **style)
            if "history" in row:
                path = row["history"]
                losses.plot(*map(_positive, (path["forget_loss"], path["retain_loss"])), color=color, alpha=0.6, lw=1.2)
        _magnify(accuracy, rows)
        accuracy.set(xlabel="UA: error on the forget set, %", ylabel="RA: accuracy on the retain set, %")
        accuracy.set_title("Where the models end")
        losses.set(
            xscale="log", yscale="log", xlabel="loss on the forget set, nats", ylabel="loss on the retain set, nats"
        )
        losses.set_title("How they got there: right is forgotten, down is preserved")
        figure.legend(loc="outside lower center", ncols=4, frameon=False)
        return _svg(figure)


def _magnify(axes, rows):
    """An inset of the points around the retrained model, where good methods crowd, if others lie far away."""
    target = rows[1]
    spread = max(max(abs(row[name] - target[name]) for row in rows) for name in ("UA", "RA"))
    if spread < 15:
        return
    inset = axes.inset_axes((0.14, 0.14, 0.42, 0.42))
    for row in rows[1:]:
        marker, size, order = ("*", 420, 1) if row is target else ("o", 40, 2)
        style = {"color": COLORS[row["method"]], "marker": marker, "s": size, "zorder": order}
        inset.scatter(row["UA"], row["RA"], edgecolor="white", **style)
    inset.set(xlim=(target["UA"] - 6, target["UA"] + 6), ylim=(target["RA"] - 4, target["RA"] + 1))
    inset.tick_params(labelsize=7)
    inset.patch.set_alpha(0.9)
    axes.indicate_inset_zoom(inset, edgecolor="#b0b5bd")


def _timeline(rows):
    panels = (
        ("retain_loss", "loss on the retain set, nats", "log"),
        ("forget_loss", "loss on the forget set, nats", "log"),
        ("multiplier", "multiplier on the retain loss", "symlog"),
        ("cosine", "cosine between forget and retain gradient", "linear"),
    )
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.4, 6.4), layout="constrained")
        for axes, (name, title, scale) in zip(figure.subplots(2, 2).flat, panels, strict=True):
            for row in rows:
                values = row.get("history", {}).get(name, [])
                if any(value is not None for value in values):
                    shown = _positive(values) if scale == "log" else [float("nan") if v is None else v for v in values]
                    axes.plot(row["history"]["step"], shown, color=COLORS[row["method"]], lw=1.6)
                elif row["method"] == "retrained" and name.endswith("loss"):
                    axes.axhline(max(row[name], SMALLEST_LOSS), color=COLORS["retrained"], ls=":", lw=1.2)
            axes.set_title(title)
            axes.set_yscale(scale)
            axes.set_xlabel("step")
            if name == "cosine":
                axes.axhline(0, color="#b0b5bd", lw=0.8)
        return _svg(figure)


def _losses(row):
    return max(row["forget_loss"], SMALLEST_LOSS), max(row["retain_loss"], SMALLEST_LOSS)


def _positive(values):
    return [float("nan") if value is None else max(value, SMALLEST_LOSS) for value in values]


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>eupmu demo: {title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1c2026; max-width: 1040px; margin: 40px auto; padding: 0 20px; }}
h1 {{ font-size: 26px; margin: 0; }} h2 {{ font-size: 17px; margin: 36px 0 8px; }}
.sub {{ color: #6b7078; margin: 4px 0 20px; }} .headline {{ font-size: 17px; }}
table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 6px 10px; text-align: right; border-bottom: 1px solid #eceef1; }}
th:first-child {{ text-align: left; font-weight: 500; white-space: nowrap; }}
thead th {{ color: #6b7078; font-weight: 500; font-size: 13px; }}
tr.anchor {{ color: #6b7078; }} tr.best {{ background: #eef7f2; font-weight: 600; }}
i {{ display: inline-block; width: 10px; height: 10px; border-radius: 5px; margin-right: 8px; }}
dl {{ display: grid; grid-template-columns: 70px 1fr; gap: 2px 12px; color: #4b5058; font-size: 13px; }}
dt {{ font-weight: 600; }} dd {{ margin: 0; }} svg {{ width: 100%; height: auto; }}
footer {{ color: #8a8f98; font-size: 12px; margin-top: 36px; overflow-wrap: anywhere; }}
</style>
<h1>Unlearning, side by side</h1>
<p class="sub">{title}</p>
<p class="headline">{headline}</p>
<table><thead><tr><th></th>{head}</tr></thead><tbody>
{body}
</tbody></table>
<dl>{legend}</dl>
<h2>Forgetting against preserving</h2>
{tradeoff}
<h2>Over time</h2>
{timeline}
<p class="sub">Losses over time are cross-entropies on at most 2,000 examples of each set; the dotted line is the
retrained model. Methods without a multiplier have no line in that panel.</p>
<h2>What this page does not show</h2>
<p>One seed, one attack on confidences, one small model. A model that passes may still reveal the forgotten data to a
stronger attack, or relearn it quickly.</p>
<footer>{provenance}</footer>
</html>
"""
