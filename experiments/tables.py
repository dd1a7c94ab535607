"""The documents' tables, from saved rows.

Command:  uv run python experiments/tables.py
Time:     a second.
Result:   README.md and experiments/README.md with every table between `<!-- name -->` and `<!-- end -->` made anew.
"""

import re
import textwrap
from pathlib import Path

import numpy as np
from benchmark_tables import benchmark_tables
from rows import markdown, read
from shadow_tables import shadow_tables
from speed_tables import overhead_table, speed_tables

ROOT = Path(__file__).parents[1]
DOCUMENTS = (ROOT / "README.md", ROOT / "experiments" / "README.md")
DEMO_COLUMNS = {"UA": 1, "RA": 1, "TA": 1, "MIA": 1, "gap": 2, "rise": 4, "allowed_rise": 4, "share_of_retraining": 1}
BUDGET_METHODS = ("barrier", "guard", "PI", "I", "PHR", "P", "reference")


def demo_table(name: str, forget: str) -> str:
    """Means and standard deviations over seeds of the demo's rows."""
    rows = [row for row in read(f"demo_{name}") if row["forget"] == forget]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    lines = []
    for method in methods:
        cells = []
        for column, digits in DEMO_COLUMNS.items():
            values = [row[column] for row in rows if row["method"] == method and row.get(column) is not None]
            spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 and column == "gap" else ""
            cells.append(f"{np.mean(values):.{digits}f}{spread}" if values else "")
        lines.append([method, *cells])
    seeds = len({row["seed"] for row in rows})
    head = [f"{forget}, {seeds} seed{'s' * (seeds > 1)}", "UA", "RA", "TA", "MIA", "gap", "rise", "limit", "time, %"]
    return markdown(head, lines)


DATA = ("digits", "fashion_mnist")
OPTIMIZERS = {"sgd": "SGD", "adam": "Adam", "muon": "Muon"}


def budgets_table(rows: list[dict]) -> str:
    """By method and optimizer, over seeds: where runs end, where they are led to, and what they forget."""
    methods = [method for method in BUDGET_METHODS if any(row["method"] == method for row in rows)]
    lines = []
    for method in methods:
        by_optimizer = {o: [r for r in rows if (r["method"], r["optimizer"]) == (method, o)] for o in OPTIMIZERS}
        found = [row for group in by_optimizer.values() for row in group]
        lines.append(
            [
                method,
                *(f"{max(row['overshoot_last'] for row in group):+.2f}" for group in by_optimizer.values()),
                f"{100 * np.mean([row['inside'] for row in found]):.0f}",
                f"{max(row['overshoot_returned'] for row in found):+.3f}",
                *(f"{np.mean([row['UA_returned'] for row in group]):.1f}" for group in by_optimizer.values()),
                f"{np.mean([row['RA_returned'] for row in found]):.2f}",
            ]
        )
    names = list(OPTIMIZERS.values())
    head = ["", *(f"last, {name}" for name in names), "inside, %", "returned", *(f"UA, {name}" for name in names), "RA"]
    return markdown(head, lines)


def models_table(rows: list[dict]) -> str:
    """What the original and the retrained model show, means over seeds."""
    lines = []
    for forget, model in dict.fromkeys((row["forget"], row["model"]) for row in rows):
        found = [row for row in rows if (row["forget"], row["model"]) == (forget, model)]
        figures = {"UA": 1, "RA": 2, "TA": 1, "MIA": 1, "retain_loss": 4}
        lines.append(
            [
                forget,
                model,
                *(f"{np.mean([row[name] for row in found]):.{digits}f}" for name, digits in figures.items()),
            ]
        )
    return markdown(["forget", "model", "UA", "RA", "TA", "MIA", "retain loss"], lines)


def budget_summary() -> str:
    """Two sentences on the rows of `budgets.py` and `robustness.py`."""
    grid = [row for name in DATA for row in read(f"budgets_{name}") if row["stage"] == "grid"]
    random = [row for name in DATA for row in read(f"robustness_{name}")]
    steered = [row for row in grid if row["method"] in ("barrier", "PI")]
    over = sum(row["overshoot_returned"] > 0 for row in steered)
    last = max(row["overshoot_last"] for row in steered)
    released = sorted(row["overshoot_last"] for row in grid if row["method"] == "reference")
    number = len({row["number"] for row in random})

    def kept(method, end):
        return f"{100 * np.mean([row[f'overshoot_{end}'] <= 0.01 for row in random if row['method'] == method]):.0f}%"

    text = (
        f"In {len(steered)} runs of barrier and PI (digits and Fashion-MNIST, SGD, Adam and Muon, 5 seeds) "
        f"{over or 'none'} returned above the limit; their last steps ended at most {last:.1f} B above it, those of "
        f"the released code {np.median(released):.1f} B in the median and {released[-1]:.0f} B at worst. "
        f"Over {number} random settings on each data set, {kept('PI', 'returned')} keep the limit with PI and the "
        f"measured end (which helps any method). After the last step alone it is {kept('PI', 'last')}, with the "
        f"paper's step tolerance {kept('step tolerance, implicit', 'last')}, with fixed weights of 1 and 9 "
        f"{kept('fixed weight 1', 'last')} and {kept('fixed weight 9', 'last')}."
    )
    return textwrap.fill(text, 128) + "\n"


def robustness_table(rows: list[dict]) -> str:
    """By method, over random settings: the limit kept, UA and gap, of the last step and of what a budget returns."""
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        found, line = [row for row in rows if row["method"] == method], [method]
        for end in ("last", "returned"):
            kept = [row for row in found if row[f"overshoot_{end}"] <= 0.01]
            line.append(f"{100 * len(kept) / len(found):.0f}")
            line += [f"{np.nanmedian([row[f'{name}_{end}'] for row in found]):.2f}" for name in ("UA", "gap")]
            line.append(f"{max((row[f'UA_{end}'] for row in kept), default=np.nan):.1f}")
        lines.append(line)
    head = [""]
    for end in ("last", "returned"):
        head += [f"{end}: limit kept, %", "median UA", "median gap", "best UA within the limit"]
    return markdown(head, lines)


def per_class_table(rows: list[dict]) -> str:
    """By method and strength, over seeds: UA, and what the mean and the worst class pay."""
    lines = []
    for method, strength in dict.fromkeys((row["method"], row["strength"]) for row in rows):
        found = [row for row in rows if (row["method"], row["strength"]) == (method, strength)]
        mean = lambda value, found=found: np.mean([value(row) for row in found])
        figures = [
            f"{mean(lambda r: r['UA']):.1f}",
            f"{mean(lambda r: np.mean(r['rises'])):.4f}",
            f"{mean(lambda r: max(r['rises'])):.4f}",
            f"{mean(lambda r: max(r['drops'])):.2f}",
        ]
        lines.append([method, f"{strength:g}", *figures])
    return markdown(["", "B or weight", "UA", "mean rise", "worst class's rise", "worst class's fall in RA"], lines)


def all_tables() -> dict[str, str]:
    """Every table by its name in the documents; one is made for each file of rows that exists."""
    tables = {}
    for name in DATA:
        for forget in dict.fromkeys(row["forget"] for row in read(f"demo_{name}")):
            tables[f"demo {name} {forget}"] = demo_table(name, forget)
        rows = [row for row in read(f"budgets_{name}") if row["stage"] == "grid"]
        kinds: dict[str, list[dict]] = {}
        for row in rows:
            log = " log" if row["scale"] == "log" and row["schedule"] == "linear" else ""
            restarts = " restarts" if row["schedule"] == "restarts" else ""
            kinds.setdefault(f"budgets {name} {row['forget']}{log}{restarts}", []).append(row)
            if row["method"] == "reference" and log:
                kinds.setdefault(f"budgets {name} {row['forget']}", []).append(row)
        kinds.pop(f"budgets {name} class:3 log", None)
        tables |= {kind: budgets_table(found) for kind, found in kinds.items()}
        tables[f"anchored {name}"] = budgets_table([r for r in read(f"budgets_{name}") if r["stage"] == "anchored"])
        if cnn := [row for row in read(f"budgets_{name}") if row["stage"] == "cnn"]:
            tables[f"cnn {name}"] = budgets_table(cnn)
        tables[f"models {name}"] = models_table([r for r in read(f"budgets_{name}") if r["stage"] == "models"])
        tables[f"robustness {name}"] = robustness_table(read(f"robustness_{name}"))
    tables["budgets"] = budget_summary()
    tables["per class"] = per_class_table(read("per_class"))
    tables["step overhead"] = overhead_table(read("step_overhead"))
    tables |= speed_tables() | benchmark_tables() | shadow_tables(read("shadows"))
    return tables


def main():
    texts = {path: path.read_text() for path in DOCUMENTS}
    for name, table in all_tables().items():
        block = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        place = next((path for path, text in texts.items() if block.search(text)), None)
        if place is None:
            raise SystemExit(f"no document has a place for the table {name!r}: <!-- {name} --> ... <!-- end -->")
        texts[place] = block.sub(lambda match, table=table: match[1] + table + match[2], texts[place])
    for path, text in texts.items():
        path.write_text(text)


if __name__ == "__main__":
    main()
