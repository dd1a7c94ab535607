"""What somebody gets who takes any setting of a method: the gaps of all its trials, and what they cost."""

import numpy as np

from eupmu_jax import metrics
from eupmu_jax.benchmark import rows as saved_rows
from eupmu_jax.benchmark import summary, tuning
from eupmu_jax.benchmark.designs import Case, Design
from experiments import parts

# In points of accuracy on the retain set.
LIMITS = (1, 3)


def table(found: list[dict], name: str, design: Design, case: Case) -> str:
    """A line for each method, by the median gap of its trials on the tuning problem.

    Trial i is the same point of every method's space, so its gap is paired with that of the method whose median is the
    least: the interval is that of the mean difference.
    """
    mine = summary.once(saved_rows.select(found, design=name, forget=case.forget))
    (original,) = saved_rows.select(mine, kind="model", model="original", seed=design.tuning_seed)
    methods = [line.name for line in summary.lines_of(mine, name, design, case) if line.trials]
    trials = {method: tuning.trials_of(mine, {"kind": "trial", "method": method}) for method in methods}
    gaps = {method: np.array([row["gap"] for row in its]) for method, its in trials.items()}
    ranked = sorted(methods, key=lambda method: (np.median(gaps[method]), method))
    lines = []
    for method in ranked:
        its, lost = gaps[method], np.array([original["RA"] - row["RA"] for row in trials[method]])
        blind = its[tuning.best(trials[method], "blind")]
        _, low, high = metrics.paired_interval(its, gaps[ranked[0]])
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
