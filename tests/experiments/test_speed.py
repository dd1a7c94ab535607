"""Every speed benchmark on a tiny scale, and the tables of its rows."""

import subprocess
import sys
from pathlib import Path

import pytest

from eupmu_jax.benchmark import rows as store
from experiments.speed import page

pytestmark = pytest.mark.slow

SPEED = Path(page.__file__).parent


@pytest.fixture
def run(tmp_path):
    def run(name, *arguments):
        out = tmp_path / "rows.jsonl"
        script = SPEED / f"{name}.py"
        subprocess.run([sys.executable, script, *arguments, "--out", out], check=True, capture_output=True)
        rows = store.read(out)
        assert all({"command", "device", "versions"} <= row.keys() for row in rows)
        return rows

    return run


def test_step_overhead_writes_a_row_for_each_variant(run):
    rows = run("step_overhead", "--models", "mlp", "--rounds", "2", "--compile-rounds", "1", "--batch", "8")
    explicit = [f"explicit {mode}" for mode in ("vmap", "unroll", "auto")]
    implicit = [f"implicit {proxy}" for proxy in ("same_batch", "next_batch")]
    assert [row["variant"] for row in rows] == ["plain", *explicit, *implicit]
    assert rows[0]["ratio"] == rows[0]["compile_ratio"] == 1.0
    assert all(row["ratio"] > 0 and row["temporary_bytes"] > 0 for row in rows)
    for table in (page.overhead_table, page.compile_table):
        assert table(rows).splitlines()[2].startswith("| mlp, 2.9 M, 8+8 | ")


def test_surgery_alone_is_compared_with_memory_traffic(run):
    rows = run("surgery_alone", "--millions", "0.1", "--blocks", "1", "--rounds", "2")
    assert [row["variant"] for row in rows[:4]] == ["traffic", "surgery", "gram", "combine"]
    assert {(row["objectives"], row["dtype"]) for row in rows} == {
        (2, "float32"),
        (2, "bfloat16"),
        (3, "float32"),
        (5, "float32"),
    }
    assert rows[0]["ratio"] == 1.0
    assert rows[0]["traffic_bytes"] == 5 * 4 * rows[0]["parameters"]
    assert len(page.surgery_table(rows).splitlines()) == 2 + len(rows) // 4


def test_dispatch_distinguishes_the_loop_from_the_scans(run):
    rows = run("dispatch", "--width", "16", "--batch", "8", "--rounds", "2")
    assert [row["variant"] for row in rows] == ["loop", "scan of 4", "scan of 24"]
    assert all(0 < row["python_share"] <= 1 for row in rows)
    assert len(page.dispatch_table(rows).splitlines()) == 5


@pytest.mark.parametrize(("axis", "value"), [pytest.param("objectives", 3, marks=pytest.mark.long), ("devices", 2)])
def test_scaling_is_compared_with_the_plain_step(run, axis, value):
    tiny = "--width", "16", "--examples", "48", "--rounds", "2"
    rows = run("scaling", "--axes", axis, "--values", str(value), *tiny)
    assert [row["variant"] for row in rows] == ["plain", "explicit vmap", "explicit unroll"]
    assert {row[axis] for row in rows} == {value}
    assert rows[0]["ratio"] == 1.0
    assert sum(rows[0]["batch"]) == 48
    assert len(page.scaling_table(rows).splitlines()) == 3


def test_the_profile_distinguishes_the_parts_of_a_step(run):
    rows = run("profile_step", "--models", "mlp", "--batch", "8", "--rounds", "2")
    assert {row["variant"] for row in rows} == {"unroll", "vmap"}
    shares = {row["kind"]: row["share"] for row in rows if row["variant"] == "unroll"}
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["matrix products"] > 0
    assert shares["surgery"] > 0
    assert len(page.profile_table(rows).splitlines()) == 4
