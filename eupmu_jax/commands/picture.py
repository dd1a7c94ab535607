"""Figures of runs: errors of both sets over the steps, their target and limit, and the weight that steers them."""

import io
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from eupmu_jax.benchmark.style import STYLE

# A logarithmic axis cannot show a loss of 0.
SMALLEST_LOSS = 1e-6
MUTED = "#8a8f98"
# Axes of errors reach up to this many times the first run's errors, target or limit.
FRAME = 3
# Losses that differ by this factor are shown on a logarithmic axis.
WIDE = 10

PANELS = {
    "forget_error": "error on the forget set",
    "weight": "weight of the forget gradient",
    "retain_error": "error on the retain set",
    "retain_loss": "loss on the retain set",
}


def of_runs(
    histories: Mapping[str, Mapping[str, Sequence]],
    colors: Mapping[str, str],
    *,
    ends: Mapping[str, Mapping[str, float]] | None = None,
    target: float | None = None,
    interval: tuple[float, float] | None = None,
    limit: float | None = None,
    retrained: Mapping[str, float] | None = None,
    rates: bool = True,
) -> Figure:
    """Four panels over the steps: forget error, weight of the forget gradient, retain error, retain loss.

    Args:
      histories: History of each run, as in `unlearn`'s result; the first one is drawn on top.
      colors: Colour of each run.
      ends: Figures of the returned parameters, where they differ from those of the last step; drawn as dots.
      target, interval: Target of the forget error and its interval, if it was steered.
      limit: Limit on the retain error.
      retrained: `forget_error`, `retain_error` and `retain_loss` of a retrained model, for dotted lines.
      rates: Whether errors are rates, shown in percent, and losses are in nats.
    """
    retrained, scale = retrained or {}, 100 if rates else 1
    units = {"forget_error": ", %", "retain_error": ", %", "retain_loss": ", nats"} if rates else {}
    marks = {"forget_error": [target, *(interval or ())], "retain_error": [limit]}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.4, 6), layout="constrained")
        axes_of = dict(zip(PANELS, figure.subplots(2, 2).flat, strict=True))
        for name, axes in axes_of.items():
            _lines(axes, name, histories, colors, ends or {}, scale)
            axes.set_title(PANELS[name] + units.get(name, ""))
            if name in retrained:
                axes.axhline(_shown(name, retrained[name], scale), color="#111418", ls=":", lw=1.2)
            if name in marks:
                first = next(iter(histories.values()))[name]
                _frame(axes, [*marks[name], retrained.get(name)], [v for v in first if v is not None], scale)
        forget, weight, retain, loss = axes_of.values()
        drawn = np.concatenate([line.get_ydata() for line in loss.lines] or [[1.0]])
        if np.nanmax(drawn) > WIDE * np.nanmin(drawn):
            loss.set_yscale("log")
        if interval is not None:
            forget.axhspan(*(scale * end for end in interval), color="#0b6e4f", alpha=0.12, lw=0)
        if target is not None:
            forget.axhline(scale * target, color="#0b6e4f", ls="--", lw=1)
            _say(forget, "unseen data" if interval else "target", scale * target)
        if retrained and (target is None or abs(target - retrained["forget_error"]) > 0.02):
            _say(forget, "retrained", scale * retrained["forget_error"])
        if limit is not None and np.isfinite(limit):
            retain.axhline(scale * limit, color="#b3261e", ls="--", lw=1)
            _say(retain, "limit", scale * limit)
        if not weight.lines:
            weight.set_axis_off()
        elif not any(np.any(line.get_ydata()) for line in weight.lines):
            weight.set_ylim(0, 1)
        for axes in (retain, loss):
            axes.set_xlabel("step")
        return figure


def _lines(axes, name, histories, colors, ends, scale):
    """Draws a line for each run that has the figure, and a dot for what it returned."""
    for order, (run, history) in enumerate(reversed(list(histories.items()))):
        values = np.array([np.nan if v is None else _shown(name, v, scale) for v in history.get(name, ())], float)
        if not np.isfinite(values).any():
            continue
        first = order == len(histories) - 1
        style = {"color": colors[run], "alpha": 1.0 if first else 0.85, "zorder": 3 + order}
        axes.plot(history["step"], values, lw=2.2 if first else 1.2, **style)
        if ends.get(run, {}).get(name) is not None:
            end = _shown(name, ends[run][name], scale)
            axes.plot(history["step"][-1], end, "o", ms=6 if first else 4, clip_on=False, **style)


def _shown(name, value, scale):
    """An error on its scale, or a loss raised to what a logarithmic axis can show."""
    return max(value, SMALLEST_LOSS) if name == "retain_loss" else value * (scale if name.endswith("error") else 1)


def _frame(axes, marks, first_run, scale):
    """Sets the frame so that all marks and the first run are inside it; only other runs may leave it."""
    marks = [scale * v for v in marks if v is not None and np.isfinite(v)]
    highest = min(axes.get_ylim()[1], FRAME * max([0.01 * scale, *marks, *(scale * v for v in first_run)]))
    highest = max([highest, *(min(1.25 * mark, 1.05 * scale) if scale > 1 else 1.25 * mark for mark in marks)])
    axes.set_ylim(-0.04 * highest, highest)


def _say(axes, text, height):
    place = {"xycoords": ("axes fraction", "data"), "xytext": (0, 2), "textcoords": "offset points"}
    axes.annotate(text, (0.995, height), ha="right", va="bottom", fontsize=7.5, color=MUTED, zorder=9, **place)


def svg(figure: Figure) -> str:
    """The figure as an SVG element."""
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
