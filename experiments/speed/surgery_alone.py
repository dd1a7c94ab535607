"""Time of explicit surgery alone, against reading the stacked gradients twice and writing one direction.

Command:  uv run python experiments/speed/surgery_alone.py
Time:     about 2 minutes on 2 CPU cores; 3 GB of memory.
Result:   at most 1.5 times the traffic for 100 M float32 parameters and K = 2; rows in
          experiments/speed/surgery_alone.jsonl.

The gradients are those of a decoder with one large embedding. *surgery* is `unilateral_surgery().update`: Gram matrix,
solution, combination. *traffic* is two programs that only move the same memory: a sum over all elements, which XLA's
CPU backend runs on all cores at the speed of memory, and the sum of the rows, which reads them and writes one. The
second waits for the first, as the combination waits for the multipliers. *gram* and *combine* are the two passes of the
surgery as separate programs, which may take longer than they do within the surgery.
"""

import argparse
import statistics
from pathlib import Path

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

import eupmu_jax as eupmu
from eupmu_jax._stack import algebra
from eupmu_jax.benchmark import rows as store
from experiments.speed.timing import FOLDER, in_turns, keep_memory, provenance, ratio

# Millions of parameters, K, dtype.
CASES = [
    (10, 2, "float32"),
    (10, 2, "bfloat16"),
    (10, 3, "float32"),
    (10, 5, "float32"),
    (100, 2, "float32"),
    (100, 2, "bfloat16"),
    (100, 3, "float32"),
    (100, 5, "float32"),
]


def gradients(millions: float, count: int, dtype: str, blocks: int) -> dict[str, jax.Array]:
    """Stacked gradients of transformer blocks and an embedding."""
    width = max(64, 64 * round((millions * 1e6 / (50 + 12 * blocks)) ** 0.5 / 64))
    shapes = {"embedding": (50 * width, width)}
    for block in range(blocks):
        layers = {
            "qkv": (width, 3 * width),
            "out": (width, width),
            "up": (width, 4 * width),
            "down": (4 * width, width),
        }
        layers |= {"up_bias": (4 * width,), "norm": (width,)}
        shapes |= {f"{name} {block}": shape for name, shape in layers.items()}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {
        name: jax.random.normal(key, (count, *shape), dtype)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def measure(millions: float, count: int, dtype: str, blocks: int, rounds: int) -> list[dict]:
    """Rows of one case."""
    grads = gradients(millions, count, dtype, blocks)
    surgery = eupmu.unilateral_surgery(num_objectives=count)
    state = surgery.init(jax.tree.map(lambda leaf: leaf[0], grads))
    update, gram, combine = jax.jit(surgery.update), jax.jit(algebra.gram_matrix), jax.jit(algebra.combine)
    weights = jnp.arange(1.0, count + 1)
    read = jax.jit(lambda grads: jax.tree.map(lambda leaf: jnp.sum(leaf, dtype=jnp.float32), grads))
    write = jax.jit(lambda grads: jax.tree.map(lambda leaf: sum(leaf[k] for k in range(1, count)) + leaf[0], grads))

    def traffic():
        jax.block_until_ready(read(grads))
        jax.block_until_ready(write(grads))

    times = in_turns(
        {
            "traffic": traffic,
            "surgery": lambda: jax.block_until_ready(update(grads, state)),
            "gram": lambda: jax.block_until_ready(gram(grads)),
            "combine": lambda: jax.block_until_ready(combine(grads, weights)),
        },
        rounds,
    )
    size = sum(leaf.size for leaf in jax.tree.leaves(grads)) // count
    return [
        {
            "parameters": size,
            "objectives": count,
            "dtype": dtype,
            "variant": variant,
            "ratio": ratio(times, variant, "traffic"),
            "median_seconds": statistics.median(times[variant]),
            "traffic_bytes": (2 * count + 1) * size * jnp.dtype(dtype).itemsize,
            "rounds": rounds,
            "seed": 0,
            **provenance(),
        }
        for variant in times
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=float, help="of parameters, one size in place of the usual ones")
    parser.add_argument("--blocks", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=FOLDER / "surgery_alone.jsonl")
    arguments = parser.parse_args()
    keep_memory()
    cases = dict.fromkeys((arguments.millions or millions, *case) for millions, *case in CASES)
    rows = []
    table = Table("parameters", "K", "dtype", "variant", "time / traffic", "ms")
    for case in cases:
        for row in measure(*case, arguments.blocks, arguments.rounds):
            rows.append(row)
            cells = [row["variant"], f"{row['ratio']:.2f}", f"{1e3 * row['median_seconds']:.1f}"]
            table.add_row(f"{row['parameters'] / 1e6:.1f} M", str(row["objectives"]), row["dtype"], *cells)
    store.replace(arguments.out, rows)
    Console().print(table)


if __name__ == "__main__":
    main()
