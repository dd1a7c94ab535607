"""Tables on membership example by example, from the rows of `shadows.py`."""

import numpy as np
from rows import markdown

from eupmu_jax import metrics


def _name(row):
    return row["method"] if row["objective"] is None else f"{row['method']}, {row['objective'].replace('_', ' ')}"


def attack_table(rows: list[dict]) -> str:
    """U-LiRA on each method; the interval is that of the mean of the AUCs of single pairs of shadow models."""
    lines = []
    for row in (row for row in rows if row["stage"] == "membership"):
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
    return markdown(["", "AUC", "95 %", "TPR, %", "AUC, hardest", "shift of phi", "UA", "RA", "TA"], lines)


def forget_sets_table(rows: list[dict]) -> str:
    """Means over seeds for both kinds of forget set; the gap with its standard deviation."""
    rows = [row for row in rows if row["stage"] == "forget set"]
    lines = []
    for name in dict.fromkeys(map(_name, rows)):
        line = [name]
        for kind in ("random", "memorised"):
            found = [row for row in rows if (_name(row), row["forget"]) == (name, kind)]
            gaps = [row["gap"] for row in found]
            line += [f"{np.mean([row[figure] for row in found]):.1f}" for figure in ("UA", "RA", "TA", "MIA")]
            spread = f" ± {np.std(gaps, ddof=1):.2f}" if len(gaps) > 1 else ""
            line.append(f"{np.mean(gaps):.2f}{spread}")
        lines.append(line)
    head = [""]
    for kind in ("random", "memorised"):
        head += [f"{kind}: UA", "RA", "TA", "MIA", "gap"]
    return markdown(head, lines)


def shadow_tables(rows: list[dict]) -> dict[str, str]:
    """Both tables by their names in the documents, if there are rows."""
    return {"u-lira": attack_table(rows), "memorised": forget_sets_table(rows)} if rows else {}
