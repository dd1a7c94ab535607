"""The Matplotlib style of every figure."""

from typing import Any

STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#b0b5bd",
    "axes.labelcolor": "#3b4048",
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#eceef1",
    "xtick.color": "#6b7078",
    "ytick.color": "#6b7078",
    "svg.hashsalt": "eupmu",
}
