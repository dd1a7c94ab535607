"""The page on per-example membership: U-LiRA, and forget sets of memorised examples, from `rows.jsonl`."""

from pathlib import Path

import numpy as np

from eupmu_jax import metrics
from eupmu_jax.benchmark import rows
from eupmu_jax.methods import METHODS
from experiments import parts

ROWS = Path(__file__).with_name("rows.jsonl")


def blocks() -> dict[str, str]:
    """Both tables."""
    found = [row for row in rows.read(ROWS) if row.get("method_version") == version_of(row)]
    return {"u-lira": attack_table(found), "memorised": forget_sets_table(found)}


def version_of(row: dict) -> int | None:
    """The current version of a row's method; None for a model without one."""
    return METHODS[row["method"]].version if row.get("method") in METHODS else None


def _name(row):
    if row["settings"] == {}:
        return f"{row['method']}, untuned"
    return row["method"] if row["objective"] is None else f"{row['method']}, {row['objective'].replace('_', ' ')}"


def attack_table(found: list[dict]) -> str:
    """U-LiRA on each method; the interval is that of the mean of the AUCs of single pairs of shadow models."""
    lines = []
    for row in rows.select(found, stage="membership"):
        pairs = row["AUC_of_pairs"]
        interval = metrics.paired_interval(pairs, np.zeros(len(pairs)))
        lines.append(
            [
                _name(row),
                f"{row['AUC']:.3f}",
                f"{interval.low:.3f} to {interval.high:.3f}",
                f"{100 * row['TPR at 1% FPR']:.1f}",
                f"{row['AUC_hardest']:.3f}",
                f"{row['shift']:+.2f}",
                *(f"{row[figure]:.1f}" for figure in ("UA", "RA", "TA")),
            ]
        )
    return parts.table(["", "AUC", "95 %", "TPR, %", "AUC, hardest", "shift of phi", "UA", "RA", "TA"], lines)


def forget_sets_table(found: list[dict]) -> str:
    """Means over seeds for both kinds of forget set; the gap with its standard deviation."""
    judged = rows.select(found, stage="forget set")
    lines = []
    for name in dict.fromkeys(map(_name, judged)):
        line = [name]
        for kind in ("random", "memorised"):
            mine = [row for row in rows.select(judged, forget=kind) if _name(row) == name]
            gaps = [row["gap"] for row in mine]
            line += [f"{np.mean([row[figure] for row in mine]):.1f}" for figure in ("UA", "RA", "TA", "MIA")]
            spread = f" ± {np.std(gaps, ddof=1):.2f}" if len(gaps) > 1 else ""
            line.append(f"{np.mean(gaps):.2f}{spread}")
        lines.append(line)
    head = [""]
    for kind in ("random", "memorised"):
        head += [f"{kind}: UA", "RA", "TA", "MIA", "gap"]
    return parts.table(head, lines)
