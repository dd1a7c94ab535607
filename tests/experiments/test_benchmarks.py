import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "experiments" / "benchmarks" / "step_overhead.py"


def test_step_overhead_writes_a_row_for_each_variant(tmp_path):
    out = tmp_path / "rows.jsonl"
    subprocess.run(
        [sys.executable, SCRIPT, "--models", "mlp", "--rounds", "2", "--batch", "8", "--out", out],
        check=True,
        capture_output=True,
    )
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    explicit = [f"explicit {mode}" for mode in ("vmap", "unroll", "auto")]
    implicit = [f"implicit {proxy}" for proxy in ("same_batch", "next_batch")]
    assert [row["variant"] for row in rows] == ["plain", *explicit, *implicit]
    assert rows[0]["ratio"] == 1.0
    assert all(row["ratio"] > 0 and row["temporary_bytes"] > 0 for row in rows)
