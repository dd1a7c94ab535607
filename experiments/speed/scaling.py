"""The explicit step against the plain one, by number of parameters, number of objectives, batch, and devices.

Command:  uv run python experiments/speed/scaling.py
Time:     about 10 minutes on 2 CPU cores.
Result:   rows in experiments/speed/scaling.jsonl.

The model and the steps are those of the MLP in step_overhead.py. With K objectives each has a K-th of the examples.
Devices are forced host devices on the same cores, with the examples split over them and the parameters replicated.
Nothing can get faster, and the ratio of explicit to plain grows, as one machine sums both gradients for every device in
turn. Every case runs in its own process.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

from eupmu_jax.benchmark import rows as store
from experiments.speed.step_overhead import problem, variants
from experiments.speed.timing import FOLDER, in_turns, keep_memory, provenance, ratio, stepper

VARIANTS = ("plain", "explicit vmap", "explicit unroll")
USUAL = {"width": 1024, "objectives": 2, "examples": 1024, "devices": 1}
AXES = {
    "width": (256, 512, 1024, 2048),
    "objectives": (2, 3, 5, 9),
    "examples": (256, 512, 1024, 2048),
    "devices": (1, 2, 4, 8),
}


def measure(axis: str, case: dict, rounds: int) -> list[dict]:
    """Rows of one case, on the devices of this process."""
    mesh = jax.make_mesh((case["devices"],), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    on_mesh = lambda tree, *axes: (
        jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*axes))) if case["devices"] > 1 else tree
    )
    # A multiple of every number of devices.
    size = max(8, case["examples"] // case["objectives"] // 8 * 8)
    loss, params, statistics_, make_batch = problem("mlp", size, case["width"])
    batches = on_mesh(tuple(make_batch(k) for k in range(case["objectives"])), "data")
    statistics_ = on_mesh(statistics_)
    calls = {}
    for variant, (optimizer, step) in variants(loss, case["objectives"]).items():
        if variant in VARIANTS:
            own = on_mesh(jax.tree.map(jnp.array, params))
            carry = own, on_mesh(optimizer.init(own))
            program = jax.jit(step, donate_argnums=(0, 1)).lower(*carry, batches, statistics_).compile()
            calls[variant] = stepper(program, carry, batches, statistics_)
    times = in_turns(calls, rounds)
    return [
        {
            **case,
            "axis": axis,
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
            "batch": [size] * case["objectives"],
            "variant": variant,
            "ratio": ratio(times, variant, "plain"),
            "median_seconds": statistics.median(times[variant]),
            "rounds": rounds,
            "seed": 0,
            **provenance(),
        }
        for variant in times
    ]


def in_process(axis: str, case: dict, rounds: int) -> list[dict]:
    """The rows of `measure`, from a process of as many devices as the case asks for."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={case['devices']}"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.jsonl"
        request = json.dumps([axis, case, rounds])
        subprocess.run(
            [sys.executable, __file__, "--case", request, "--out", out],
            env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
            check=True,
        )
        return [row | provenance() for row in store.read(out)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--values", nargs="+", type=int, help="in place of the usual ones")
    parser.add_argument("--width", type=int, default=USUAL["width"], help="of the model where nothing else is said")
    parser.add_argument("--examples", type=int, default=USUAL["examples"], help="of all objectives together")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=FOLDER / "scaling.jsonl")
    arguments = parser.parse_args()
    keep_memory()
    if arguments.case:
        store.replace(arguments.out, measure(*arguments.case))
        return
    usual = USUAL | {"width": arguments.width, "examples": arguments.examples}
    rows = []
    for axis in arguments.axes:
        for value in arguments.values or AXES[axis]:
            rows += in_process(axis, usual | {axis: value}, arguments.rounds)
    store.replace(arguments.out, rows)
    table = Table("axis", "value", "variant", "time / plain", "ms")
    for row in rows:
        figures = f"{row['ratio']:.3f}", f"{1e3 * row['median_seconds']:.1f}"
        table.add_row(row["axis"], str(row[row["axis"]]), row["variant"], *figures)
    Console().print(table)


if __name__ == "__main__":
    main()
