"""Means and intervals over seeds from the rows of a benchmark, for tables and figures."""

from typing import NamedTuple

import numpy as np

from eupmu_jax import metrics
from eupmu_jax.benchmark import rows as saved_rows
from eupmu_jax.benchmark import tuning
from eupmu_jax.benchmark.designs import Case, Design

FIGURES = ("UA", "RA", "TA", "MIA", "gap", "kl_forget", "kl_test", "retain_loss")


class Line(NamedTuple):
    """A method, or the original or retrained model, in one case.

    Attributes:
      name: Name of the method or model.
      seeds: Seeds that were run.
      figures: Means over seeds of `FIGURES` and of the other numbers in the rows.
      gaps: The gap for each seed.
      gap: Bootstrap interval of the mean gap; None for fewer than two seeds.
      tied: Whether the interval of its paired difference to the method with the least gap contains 0.
      trials: Gaps of all trials on the tuning problem, including those that diverged.
      rows: The rows, ordered by seed.
    """

    name: str
    seeds: list[int]
    figures: dict[str, float]
    gaps: list[float]
    gap: metrics.Interval | None
    tied: bool
    trials: list[float]
    rows: list[dict]


def lines_of(rows: list[dict], name: str, design: Design, case: Case, score: str = "blind") -> list[Line]:
    """Lines of original, retrained, then the methods by mean gap; those that lack seeds of the design come last.

    A method is shown only once all its trials are finished, since the last one could be selected.

    Args:
      rows: Rows of the present versions, see `saved.read`; of duplicates the first counts.
      name, design, case: What is shown; only rows of the design's seeds count.
      score: Score that selects the trial: "blind", or "gap", with the retrained model in view.
    """
    rows = once(saved_rows.select(rows, design=name, forget=case.forget))
    rows = [row for row in rows if row["kind"] == "trial" or row["seed"] in design.seeds]
    lines = []
    for model in ("original", "retrained"):
        found = saved_rows.select(rows, kind="model", model=model)
        if found:
            lines.append(_line(model, found, []))
    unlearned = []
    for row_name in dict.fromkeys(row["method"] for row in rows if row.get("trial") == tuning.UNTUNED):
        found = saved_rows.select(rows, kind="run", method=row_name, trial=tuning.UNTUNED)
        unlearned.append(_line(f"{row_name}, {tuning.UNTUNED}", found, []))
    for method in dict.fromkeys(row["method"] for row in rows if row["kind"] == "trial"):
        trials = tuning.trials_of(rows, {"kind": "trial", "method": method})
        if len(trials) < design.trials:
            continue
        best = tuning.best(trials, score)
        found = saved_rows.select(rows, kind="run", method=method, trial=best)
        if found:
            unlearned.append(_line(method, found, [row["gap"] for row in trials]))

    def rank(line):
        incomplete = not set(line.seeds) >= set(design.seeds)
        return incomplete, np.nan_to_num(line.figures.get("gap", np.nan), nan=np.inf), line.name

    unlearned.sort(key=rank)
    return lines + [line._replace(tied=_tied(line, unlearned[0])) for line in unlearned]


def once(rows: list[dict]) -> list[dict]:
    """The rows of one case without duplicates, as they occur where files were joined."""
    found: dict = {}
    for row in rows:
        found.setdefault(tuple(row.get(name) for name in ("kind", "model", "method", "trial", "seed")), row)
    return list(found.values())


def _line(name, rows, trials):
    rows = sorted(rows, key=lambda row: row["seed"])
    numbers = {field for row in rows for field, value in row.items() if isinstance(value, float | int)}
    value = lambda row, field: np.nan if row.get(field) is None else row[field]
    figures = {field: float(np.mean([value(row, field) for row in rows])) for field in numbers}
    gaps = [value(row, "gap") for row in rows]
    finite = len(gaps) > 1 and np.isfinite(gaps).all()
    interval = metrics.paired_interval(gaps, np.zeros(len(gaps))) if finite else None
    return Line(name, [row["seed"] for row in rows], figures, gaps, interval, False, trials, rows)


def _tied(line, best):
    if line.name == best.name:
        return True
    comparable = len(best.gaps) > 1 and np.isfinite([*line.gaps, *best.gaps]).all() and line.seeds == best.seeds
    return bool(comparable and metrics.tied(line.gaps, best.gaps))
