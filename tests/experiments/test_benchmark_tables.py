"""The comparison of two runs of the benchmark, on the saved rows of the first."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))

import benchmark_tables

CHOSEN = ("SalUn", "EUPMU budget")


def test_a_second_run_is_inside_the_first_intervals_unless_it_is_far_off():
    first = [row for row in benchmark_tables.taken() if row["forget"] == "random:10%"]
    others = [row | {"seed": row["seed"] + 5} if row["kind"] != "trial" else row for row in first]
    others = [row for row in others if row["kind"] != "run" or row["method"] in CHOSEN]
    far = [
        row | {"gap": row["gap"] + 9.0} if row.get("method") == "SalUn" and row["kind"] == "run" else row
        for row in others
    ]
    same, moved = (benchmark_tables._again(first, second).splitlines() for second in (others, far))
    assert same[-1] == "3 of 3 second means lie inside the first interval."
    assert moved[-1] == "2 of 3 second means lie inside the first interval."
    (salun,) = [line for line in moved if line.startswith("| SalUn |")]
    assert salun.split(" | ")[5] == "no"


def test_the_summary_says_whether_the_budget_leads():
    found = [row for row in benchmark_tables.taken() if row["forget"] == "random:10%"]

    def with_gap(gap):
        mine = lambda row: row["kind"] == "run" and row["method"] == "EUPMU budget"
        text = benchmark_tables.in_short([row | {"gap": gap} if mine(row) else row for row in found])
        return " ".join(text.split())

    assert "EUPMU with a budget has the least gap, 0.01, before" in with_gap(0.01)
    assert "EUPMU with a budget is number 38 with 99.00;" in with_gap(99.0)
