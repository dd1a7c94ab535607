"""How much longer a step with surgery takes than one plain scalarised step on the same model and batch.

Command:  uv run python experiments/benchmarks/step_overhead.py
Time:     about 5 minutes on 2 CPU cores.
Result:   explicit <= 1.10, implicit same-batch <= 1.20, implicit next-batch <= 1.03 on an MLP (from 1,024 examples for
          each objective on; more for smaller batches), a transformer and a ResNet-20; rows in
          experiments/results/step_overhead.jsonl.

All variants of a model take turns in one process, in a new order each round; a ratio compares a variant with the plain
step of the same round, and the median over rounds is reported. The plain step is one backward pass of l_f + l_r over
the concatenated batch, with plain SGD, which leaves nothing for the surgery's extra work to hide behind. Parameters
and state are donated. glibc would hand temporary buffers above 32 MB back to the kernel after every step, and the page
faults of the next one would be booked on whichever variant is just above; the script turns that off for all alike.
The surgery's cost is memory traffic, the same for any batch, so its share falls as the batch grows. Memory is what the
compiler reports as temporary, beyond arguments and results.
"""

import argparse
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.table import Table

import eupmu_jax as eupmu
from eupmu_jax.models import MLP, ResNet20, Transformer
from eupmu_jax.objectives import cross_entropy

# Examples for each of the two objectives.
BATCHES = {"mlp": (256, 512, 1024), "transformer": (16,), "resnet20": (64,)}
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**34), "MALLOC_TRIM_THRESHOLD_": str(2**34)}
RESULTS = Path(__file__).parents[1] / "results" / "step_overhead.jsonl"
LEARNING_RATE = 1e-3


def problem(name: str, size: int) -> tuple:
    """`(loss, params, statistics, make_batch)`; `make_batch(seed)` draws one objective's batch."""
    if name == "mlp":
        model = MLP((784, 1024, 1024, 1024, 10), rngs=nnx.Rngs(0))
        draw = lambda rng: (rng.normal(size=(size, 784)), rng.integers(10, size=size))
    elif name == "transformer":
        model = Transformer(rngs=nnx.Rngs(0))
        draw = lambda rng: (rng.integers(512, size=(size, 128)), rng.integers(512, size=(size, 128)))
    else:
        model = ResNet20(rngs=nnx.Rngs(0))
        draw = lambda rng: (rng.normal(size=(size, 32, 32, 3)), rng.integers(10, size=size))
    graph, params, statistics = nnx.split(model, nnx.Param, ...)

    def loss(params, batch, statistics):
        model = nnx.merge(graph, params, statistics)
        value = cross_entropy(model(batch["inputs"]), batch["labels"])
        return value, nnx.state(model, nnx.Not(nnx.Param))

    def make_batch(seed):
        inputs, labels = draw(np.random.default_rng(seed))
        dtype = jnp.float32 if inputs.dtype == np.float64 else jnp.int32
        return {"inputs": jnp.asarray(inputs, dtype), "labels": jnp.asarray(labels, jnp.int32)}

    return loss, params, statistics, make_batch


def variants(loss: Callable) -> dict[str, tuple[optax.GradientTransformation, Callable]]:
    """Optimizer and step `(params, state, (forget, retain), statistics) -> (params, state, losses)` of each variant."""
    sgd = optax.sgd(LEARNING_RATE)

    def plain(params, state, batches, statistics):
        whole = jax.tree.map(lambda *parts: jnp.concatenate(parts), *batches)
        # Flax allows changes of its variables only in the trace that made them.
        fresh = lambda p: loss(p, whole, jax.tree.map(jnp.asarray, statistics))
        value, grads = jax.value_and_grad(fresh, has_aux=True)(params)
        updates, state = sgd.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    explicit = eupmu.skip_nonfinite(optax.chain(eupmu.unilateral_surgery(), sgd))
    found = {"plain": (sgd, plain)}
    for mode in ("vmap", "unroll", "auto"):
        found[f"explicit {mode}"] = explicit, eupmu.explicit_step(loss, explicit, has_aux=True, mode=mode)
    for proxy in ("same_batch", "next_batch"):
        implicit = eupmu.eupmu(LEARNING_RATE, proxy=proxy, initial_multiplier=1.0)
        found[f"implicit {proxy}"] = implicit, eupmu.implicit_step(loss, implicit, has_aux=True)
    return found


def measure(name: str, size: int, rounds: int) -> list[dict]:
    """Rows of one model and batch size."""
    loss, params, model_state, make_batch = problem(name, size)
    batches = (make_batch(0), make_batch(1))
    programs, states, times = {}, {}, {}
    for variant, (optimizer, step) in variants(loss).items():
        own = jax.tree.map(jnp.array, params)
        state = optimizer.init(own)
        start = time.perf_counter()
        programs[variant] = jax.jit(step, donate_argnums=(0, 1)).lower(own, state, batches, model_state).compile()
        times[variant] = [time.perf_counter() - start]
        states[variant] = own, state
    rng = np.random.default_rng(0)
    for _ in range(rounds + 2):
        for variant in rng.permutation(list(programs)):
            start = time.perf_counter()
            *states[variant], _ = programs[variant](*states[variant], batches, model_state)
            jax.block_until_ready(states[variant])
            times[variant].append(time.perf_counter() - start)
    compile_times = {variant: values[0] for variant, values in times.items()}
    times = {variant: values[3:] for variant, values in times.items()}
    return [
        {
            "model": name,
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
            "batch": [len(batch["labels"]) for batch in batches],
            "variant": variant,
            "ratio": statistics.median(a / b for a, b in zip(times[variant], times["plain"], strict=True)),
            "median_seconds": statistics.median(times[variant]),
            "compile_ratio": compile_times[variant] / compile_times["plain"],
            "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
            "rounds": rounds,
            "device": jax.devices()[0].device_kind,
            "versions": {package: version(package) for package in ("eupmu-jax", "jax", "jaxlib", "optax", "flax")},
            "command": shlex.join(["python", "experiments/benchmarks/step_overhead.py", *sys.argv[1:]]),
        }
        for variant, program in programs.items()
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=BATCHES, default=list(BATCHES))
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--batch", type=int, help="examples for each objective, in place of the usual ones")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if not ALLOCATOR.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ALLOCATOR)
    rows = []
    for name in arguments.models:
        for size in [arguments.batch] if arguments.batch else BATCHES[name]:
            rows += measure(name, size, arguments.rounds)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = Table("model", "variant", "time / plain", "temporary MB", "compile / plain")
    for row in rows:
        table.add_row(
            f"{row['model']} {row['batch'][0]}+{row['batch'][1]}",
            row["variant"],
            f"{row['ratio']:.3f}",
            f"{row['temporary_bytes'] / 1e6:.1f}",
            f"{row['compile_ratio']:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
