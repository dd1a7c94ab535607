"""The README's tables, from saved rows.

Command:  uv run python experiments/tables.py
Time:     a second.
Result:   README.md with every table between `<!-- name -->` and `<!-- end -->` made anew.
"""

import json
import re
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
DEMO_COLUMNS = {"UA": 1, "RA": 1, "TA": 1, "MIA": 1, "gap": 2, "rise": 4, "allowed_rise": 4, "share_of_retraining": 1}
VARIANTS = ("explicit vmap", "explicit unroll", "explicit auto", "implicit same_batch", "implicit next_batch")


def demo_table(name: str, forget: str) -> str:
    """Means and standard deviations over seeds of the demo's rows."""
    rows = [row for row in _rows(f"demo_{name}") if row["forget"] == forget]
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
    return _markdown(head, lines)


def overhead_table() -> str:
    """Ratios to the plain step, and the temporary memory of each."""
    rows = _rows("step_overhead")
    lines = []
    for plain in (row for row in rows if row["variant"] == "plain"):
        model = plain["model"]
        found = {row["variant"]: row for row in rows if (row["model"], row["batch"]) == (model, plain["batch"])}
        label = f"{model}, {plain['parameters'] / 1e6:.1f} M, {plain['batch'][0]}+{plain['batch'][1]}"
        ratios = [f"{found[variant]['ratio']:.2f}" for variant in VARIANTS]
        memory = [f"{found[variant]['temporary_bytes'] / 1e6:.0f}" for variant in ("plain", "explicit auto")]
        lines.append([label, *ratios, " / ".join(memory)])
    return _markdown(["model, batch", *VARIANTS, "temporary MB, plain / explicit auto"], lines)


def all_tables() -> dict[str, str]:
    """Every table by its name in the README; one is made for each file of rows that exists."""
    tables = {}
    for name in ("digits", "fashion_mnist"):
        if (RESULTS / f"demo_{name}.jsonl").exists():
            for forget in dict.fromkeys(row["forget"] for row in _rows(f"demo_{name}")):
                tables[f"demo {name} {forget}"] = demo_table(name, forget)
    tables["step overhead"] = overhead_table()
    return tables


def _rows(name):
    return [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text().splitlines()]


def _markdown(head, lines):
    table = [head, ["---"] + ["---:"] * (len(head) - 1), *lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in table)


def main():
    readme = ROOT / "README.md"
    text = readme.read_text()
    for name, table in all_tables().items():
        block = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not block.search(text):
            raise SystemExit(f"README.md has no place for the table {name!r}: <!-- {name} --> ... <!-- end -->")
        text = block.sub(lambda match, table=table: match[1] + table + match[2], text)
    readme.write_text(text)


if __name__ == "__main__":
    main()
