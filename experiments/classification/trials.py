"""What to expect from an arbitrary setting of a method: the gaps of all its trials, and their cost."""

import numpy as np
from scipy.stats import gmean

from eupmu_jax import metrics
from eupmu_jax.benchmark import rows as saved_rows
from eupmu_jax.benchmark import summary, tuning
from eupmu_jax.benchmark.designs import Case, Design
from experiments import parts

# In points of accuracy on the retain set.
LIMITS = (1, 3)


def table(found: list[dict], name: str, design: Design, case: Case) -> str:
    """A table with a line for each method, sorted by the median gap of its trials on the tuning problem.

    Trial i is the same point of every method's space, so its gap is paired with that of the method with the smallest
    median: the interval is that of the mean difference.
    """
    (original,) = saved_rows.select(
        summary.once(saved_rows.select(found, design=name, forget=case.forget)),
        kind="model",
        model="original",
        seed=design.tuning_seed,
    )
    trials = _ranked(found, name, design, case)
    gaps = _gaps(trials)
    first, lines = next(iter(trials)), []
    for method in trials:
        its, lost = gaps[method], np.array([original["RA"] - row["RA"] for row in trials[method]])
        blind = its[tuning.best(trials[method], "blind")]
        _, low, high = metrics.paired_interval(its, gaps[first])
        lines.append(
            [
                method,
                *(f"{value:.2f}" for value in (its.min(), blind, np.median(its))),
                f"{low:.1f} to {high:.1f}",
                f"{its.max():.1f}",
                f"{np.median(lost):.1f}",
                *(f"{100 * np.mean(lost <= limit):.0f}" for limit in LIMITS),
            ]
        )
    head = ["", "least", "chosen blindly", "median", "to the first, 95 %", "worst", "RA lost, median"]
    return parts.table(head + [f"within {limit} point{'s' * (limit > 1)}, %" for limit in LIMITS], lines)


def _ranked(found, name, design, case):
    """The trials of each method, the method with the smallest median gap first."""
    mine = summary.once(saved_rows.select(found, design=name, forget=case.forget))
    methods = [line.name for line in summary.lines_of(mine, name, design, case) if line.trials]
    trials = {method: tuning.trials_of(mine, {"kind": "trial", "method": method}) for method in methods}
    gaps = _gaps(trials)
    return {method: trials[method] for method in sorted(methods, key=lambda m: (np.median(gaps[m]), m))}


def _gaps(trials):
    return {method: np.array([row["gap"] for row in its]) for method, its in trials.items()}


def ties(found: list[dict], cases: list[tuple[str, Design, Case]]) -> dict[str, int]:
    """For each method in how many cases its median is the smallest, or its trials cannot tell it from that one."""
    tied: dict[str, int] = {}
    for name, design, case in cases:
        gaps = _gaps(_ranked(found, name, design, case))
        first = next(iter(gaps))
        for method, its in gaps.items():
            _, low, high = metrics.paired_interval(its, gaps[first])
            tied[method] = tied.get(method, 0) + int(low <= 0 <= high)
    return tied


def in_short(found: list[dict], cases: list[tuple[str, Design, Case]], ours: str) -> str:
    """The methods with the smallest medians over all cases, and the place of ours by the gaps on the reported seeds."""
    ranks, ratios, by_gap = ({} for _ in range(3))
    for name, design, case in cases:
        gaps = _gaps(_ranked(found, name, design, case))
        first = next(iter(gaps))
        for rank, (method, its) in enumerate(gaps.items(), 1):
            ranks.setdefault(method, []).append(rank)
            ratios.setdefault(method, []).append(np.median(its) / np.median(gaps[first]))
        selected = [line.name for line in summary.lines_of(found, name, design, case) if line.trials]
        for rank, method in enumerate(selected, 1):
            by_gap.setdefault(method, []).append(rank)
    means = {method: np.mean(its) for method, its in ranks.items()}, {m: gmean(its) for m, its in ratios.items()}
    best = [sorted(mean.items(), key=lambda pair: pair[1])[:3] for mean in means]
    listed = [", ".join(f"{method} {mean:.{digits}f}" for method, mean in its) for digits, its in enumerate(best, 1)]
    places = sorted((np.mean(its), method) for method, its in by_gap.items())
    place = 1 + sum(mean < np.mean(by_gap[ours]) for mean, _ in places)
    return parts.paragraph(
        f"Mean rank among {len(ranks)} methods in {len(cases)} settings, by the median over all trials: {listed[0]}; "
        f"by the gap {ours} is number {place} with {np.mean(by_gap[ours]):.1f} (number 1: {places[0][1]}, "
        f"{places[0][0]:.1f}). Geometric mean of the median's ratio to the least: {listed[1]}."
    )
