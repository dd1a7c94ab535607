"""The cost of Python: the host's time in a loop of dispatched steps, and the same steps in `jax.lax.scan`.

Command:  uv run python experiments/speed/dispatch.py
Time:     about a minute on 2 CPU cores.
Result:   Python under 3 % of explicit steps of 5 ms; rows in experiments/speed/dispatch.jsonl.

A jitted step returns before it is done, so a loop that does not read its results dispatches the next step while the
last one runs. The cost of Python is the time inside those calls, as a share of the time until the last result is ready.
A scan makes a block of steps in one call. The host's time is measured with the device busy, on cores that both share:
it includes whatever the steps took from it.
"""

import argparse
import functools
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from eupmu_jax.benchmark import rows as store
from experiments.speed.step_overhead import problem, variants
from experiments.speed.timing import FOLDER, keep_memory, provenance

STEPS = 24  # In flight before the loop waits: fewer than the CPU client queues up, or Python would wait for the device.


def measure(width: int, size: int, rounds: int) -> list[dict]:
    """Rows of the loop and of the scans over 4 and 24 steps."""
    loss, params, statistics_, make_batch = problem("mlp", size, width)
    batches = make_batch(0), make_batch(1)
    optimizer, step = variants(loss)["explicit auto"]
    jitted = jax.jit(step, donate_argnums=(0, 1))

    @functools.partial(jax.jit, donate_argnums=(0, 1), static_argnums=4)
    def scanned(params, state, batches, statistics_, length):
        def body(carry, _):
            *carry, value = step(*carry, batches, statistics_)
            return tuple(carry), value[0]

        (params, state), losses = jax.lax.scan(body, (params, state), length=length)
        return params, state, losses

    loops = {"loop": (1, lambda *args: jitted(*args))}
    for length in (4, STEPS):
        loops[f"scan of {length}"] = (length, lambda *args, length=length: scanned(*args, length))
    carries = {}
    for name in loops:
        own = jax.tree.map(jnp.array, params)
        carries[name] = own, optimizer.init(own)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in loops}
    rng = np.random.default_rng(0)
    for _ in range(rounds + 2):
        for name in rng.permutation(list(loops)):
            length, call = loops[name]
            carry, host = carries[name], 0.0
            start = time.perf_counter()
            for _ in range(STEPS // length):
                before = time.perf_counter()
                *carry, _ = call(*carry, batches, statistics_)
                host += time.perf_counter() - before
            jax.block_until_ready(carry)
            times[name].append((host, time.perf_counter() - start))
            carries[name] = carry
    times = {name: values[2:] for name, values in times.items()}
    return [
        {
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
            "batch": [len(batch["labels"]) for batch in batches],
            "variant": name,
            "steps": STEPS,
            "python_share": statistics.median(host / whole for host, whole in values),
            "python_seconds": statistics.median(host for host, _ in values) / STEPS,
            "step_seconds": statistics.median(whole for _, whole in values) / STEPS,
            "ratio": statistics.median(a / b for (_, a), (_, b) in zip(values, times["loop"], strict=True)),
            "rounds": rounds,
            "seed": 0,
            **provenance(),
        }
        for name, values in times.items()
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--batch", type=int, default=128, help="examples for each objective")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path, default=FOLDER / "dispatch.jsonl")
    arguments = parser.parse_args()
    keep_memory()
    rows = measure(arguments.width, arguments.batch, arguments.rounds)
    store.replace(arguments.out, rows)
    table = Table("variant", "Python, %", "Python, ms a step", "step, ms", "time / loop")
    for row in rows:
        milliseconds = [f"{1e3 * row[name]:.3f}" for name in ("python_seconds", "step_seconds")]
        table.add_row(row["variant"], f"{100 * row['python_share']:.2f}", *milliseconds, f"{row['ratio']:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
