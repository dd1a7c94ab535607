"""The picture of runs: errors of both sets over the steps, what they were steered to, and what steered them."""

import io
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from eupmu_jax.benchmark.style import STYLE

# A loss of 0 has no place on a logarithmic axis.
SMALLEST_LOSS = 1e-6
MUTED = "#8a8f98"
# Errors are shown up to so many times the first run's, its target or limit.
FRAME = 3


def of_runs(
    histories: Mapping[str, Mapping[str, Sequence]],
    colors: Mapping[str, str],
    *,
    ends: Mapping[str, Mapping[str, float]] | None = None,
    target: float | None = None,
    interval: tuple[float, float] | None = None,
    limit: float | None = None,
    retrained: Mapping[str, float] | None = None,
    width: float = 10.4,
) -> Figure:
    """Four panels over the steps: forget error, weight of the forget gradient, retain error, retain loss.

    Args:
      histories: Of each run, as in `unlearn`'s result; the first one is drawn on top.
      colors: Of each run.
      ends: Figures of the returned parameters, where they are not those of the last step: a dot at the end.
      target, interval: Of the forget error, if it was steered.
      limit: Of the retain error.
      retrained: `forget_error`, `retain_error` and `retain_loss` of a retrained model, for dotted lines.
      width: In inches.
    """
    panels = (
        ("forget_error", "error on the forget set, %"),
        ("weight", "weight of the forget gradient"),
        ("retain_error", "error on the retain set, %"),
        ("retain_loss", "loss on the retain set, nats"),
    )
    ends = ends or {}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, 0.58 * width), layout="constrained")
        for axes, (name, title) in zip(figure.subplots(2, 2).flat, panels, strict=True):
            scale = 100 if name.endswith("error") else 1
            for order, (run, history) in enumerate(reversed(list(histories.items()))):
                values = scale * np.array([np.nan if v is None else v for v in history.get(name, ())], float)
                if np.isfinite(values).any():
                    if name == "retain_loss":
                        values = np.maximum(values, SMALLEST_LOSS)
                    first = order == len(histories) - 1
                    width_of_line, alpha = (2.2, 1.0) if first else (1.2, 0.85)
                    style = {"color": colors[run], "alpha": alpha, "zorder": 3 + order}
                    axes.plot(history["step"], values, lw=width_of_line, **style)
                    if name in ends.get(run, {}):
                        end = max(scale * ends[run][name], SMALLEST_LOSS if name == "retain_loss" else 0)
                        axes.plot(history["step"][-1], end, "o", ms=6 if first else 4, clip_on=False, **style)
            if retrained is not None and name in retrained:
                axes.axhline(
                    max(scale * retrained[name], SMALLEST_LOSS if name == "retain_loss" else 0),
                    color="#111418",
                    ls=":",
                    lw=1.2,
                )
            axes.set_title(title)
            if name == "retain_loss":
                axes.set_yscale("log")
                continue
            if name != "weight":
                # What leaves the frame is far from everything that matters.
                marks = {"forget_error": [target, *(interval or [])], "retain_error": [limit]}[name]
                first_run = [v for v in next(iter(histories.values()))[name] if v is not None]
                marks.append((retrained or {}).get(name))
                known = [100 * v for v in (*marks, *first_run) if v is not None and np.isfinite(v)]
                highest = min(axes.get_ylim()[1], FRAME * max([1.0, *known]))
                highest = max([highest, *(125 * v for v in marks if v is not None and v < 1)])
                axes.set_ylim(-0.04 * highest, highest)
        forget, weight, retain, _ = figure.axes
        if interval is not None:
            forget.axhspan(*(100 * end for end in interval), color="#0b6e4f", alpha=0.12, lw=0)
        if target is not None:
            forget.axhline(100 * target, color="#0b6e4f", ls="--", lw=1)
            _say(forget, "unseen data" if interval else "target", 100 * target)
        if retrained is not None and (target is None or abs(target - retrained["forget_error"]) > 0.02):
            _say(forget, "retrained", 100 * retrained["forget_error"])
        if limit is not None and np.isfinite(limit):
            retain.axhline(100 * limit, color="#b3261e", ls="--", lw=1)
            _say(retain, "limit", 100 * limit)
        if not weight.lines:
            weight.set_axis_off()
        for axes in figure.axes[2:]:
            axes.set_xlabel("step")
        return figure


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
