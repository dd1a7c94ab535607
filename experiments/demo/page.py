"""The page of the demo: means over seeds, from `rows.jsonl`."""

from pathlib import Path

import matplotlib
import numpy as np

from eupmu_jax.benchmark import rows
from eupmu_jax.commands import page
from experiments import parts

ROWS = Path(__file__).with_name("rows.jsonl")
COLUMNS = {"UA": 1, "RA": 1, "TA": 1, "MIA": 1, "gap": 2, "rise": 4, "allowed_rise": 4, "share_of_retraining": 1}


def blocks() -> dict[str, str]:
    """A table for each data set and forget set."""
    found = rows.read(ROWS)
    cases = dict.fromkeys((row["data"], row["forget"]) for row in found)
    return {f"demo {data} {forget}": table(rows.select(found, data=data, forget=forget)) for data, forget in cases}


def draw(folder: Path) -> None:
    """A run of EUPMU over its steps."""
    found = rows.read(ROWS)
    case = {"data": "digits", "forget": "random:10%", "seed": 0}
    (run,), (retrained,) = (rows.select(found, method=method, **case) for method in ("EUPMU", "retrained"))
    with matplotlib.rc_context(parts.STYLE):
        figure = page.timeline([{}, retrained, run])
        parts.save(figure, folder / "run.svg")


def table(found: list[dict]) -> str:
    """Means over seeds, and the gap's standard deviation, for one forget set."""
    lines = []
    for method in dict.fromkeys(row["method"] for row in found):
        cells = []
        for column, digits in COLUMNS.items():
            values = [row[column] for row in rows.select(found, method=method) if row.get(column) is not None]
            spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 and column == "gap" else ""
            cells.append(f"{np.mean(values):.{digits}f}{spread}" if values else "")
        lines.append([method, *cells])
    seeds = len({row["seed"] for row in found})
    title = f"{found[0]['forget']}, {seeds} seed{'s' * (seeds > 1)}"
    return parts.table([title, "UA", "RA", "TA", "MIA", "gap", "rise", "limit", "time, %"], lines)
