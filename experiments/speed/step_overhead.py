"""How much longer a step with surgery takes than one plain scalarised step on the same model and batch.

Command:  uv run python experiments/speed/step_overhead.py
Time:     about 10 minutes on 2 CPU cores.
Result:   explicit <= 1.10, implicit same-batch <= 1.20, implicit next-batch <= 1.03 on an MLP (from 1,024 examples for
          each objective on; more for smaller batches), a transformer, a ResNet-20 and a ResNet-18; rows in
          experiments/speed/step_overhead.jsonl.

All variants of a model take turns in one process (see timing.py). The plain step is one backward pass of l_f + l_r
over the concatenated batch, with plain SGD, which leaves nothing for the surgery's extra work to hide behind.
Parameters and state are donated. The surgery's cost is memory traffic, the same for any batch, so its share falls as
the batch grows. Memory is what the compiler reports as temporary, beyond arguments and results.
"""

import argparse
import functools
import statistics
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.table import Table

import eupmu_jax as eupmu
from eupmu_jax.benchmark import rows as store
from eupmu_jax.models import MLP, ResNet18, ResNet20, Transformer
from eupmu_jax.objectives import cross_entropy
from experiments.speed.timing import FOLDER, in_turns, keep_memory, provenance, ratio, stepper

# Examples for each of the two objectives.
BATCHES = {"mlp": (256, 512, 1024), "transformer": (16,), "resnet20": (64,), "resnet18": (16,)}
LEARNING_RATE = 1e-3


def problem(name: str, size: int, width: int = 1024) -> tuple:
    """`(loss, params, statistics, make_batch)`; `make_batch(seed)` draws an objective's batch, `width` is the MLP's."""
    if name == "mlp":
        model = MLP((784, width, width, width, 10), rngs=nnx.Rngs(0))
        draw = lambda rng: (rng.normal(size=(size, 784)), rng.integers(10, size=size))
    elif name == "transformer":
        model = Transformer(rngs=nnx.Rngs(0))
        draw = lambda rng: (rng.integers(512, size=(size, 128)), rng.integers(512, size=(size, 128)))
    else:
        model = nnx.jit(lambda: {"resnet20": ResNet20, "resnet18": ResNet18}[name](rngs=nnx.Rngs(0)))()
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


def variants(loss: Callable, count: int = 2) -> dict[str, tuple[optax.GradientTransformation, Callable]]:
    """Optimizer and step `(params, state, batches, statistics) -> (params, state, losses)` of each variant.

    `count` is the number of batches, the forget batch first.
    """
    sgd = optax.sgd(LEARNING_RATE)

    def plain(params, state, batches, statistics):
        whole = jax.tree.map(lambda *parts: jnp.concatenate(parts), *batches)
        # Flax allows changing variables only in the trace that created them.
        fresh = lambda p: loss(p, whole, jax.tree.map(jnp.asarray, statistics))
        value, grads = jax.value_and_grad(fresh, has_aux=True)(params)
        updates, state = sgd.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    explicit = eupmu.skip_nonfinite(optax.chain(eupmu.unilateral_surgery(num_objectives=count), sgd))
    found = {"plain": (sgd, plain)}
    for mode in ("vmap", "unroll", "auto"):
        found[f"explicit {mode}"] = explicit, eupmu.explicit_step(loss, explicit, has_aux=True, mode=mode)
    for proxy in ("same_batch", "next_batch"):
        implicit = eupmu.eupmu(LEARNING_RATE, proxy=proxy, initial_multiplier=1.0, num_objectives=count)
        found[f"implicit {proxy}"] = implicit, eupmu.implicit_step(loss, implicit, has_aux=True)
    return found


def measure(name: str, size: int, rounds: int, compile_rounds: int) -> list[dict]:
    """Rows of one model and batch size."""
    loss, params, model_state, make_batch = problem(name, size)
    batches = (make_batch(0), make_batch(1))
    programs, calls, compilations = {}, {}, {}

    def compile_program(variant, step, own, state):
        # A new function, as JAX would otherwise reuse an earlier trace.
        jitted = jax.jit(lambda *args: step(*args), donate_argnums=(0, 1))
        programs[variant] = jitted.lower(own, state, batches, model_state).compile()

    for variant, (optimizer, step) in variants(loss).items():
        carry = jax.tree.map(jnp.array, params), optimizer.init(params)
        compilations[variant] = functools.partial(compile_program, variant, step, *carry)
        calls[variant] = carry
    # The first compilation of a process takes longer, whatever it compiles.
    compile_times = in_turns(compilations, compile_rounds, warmup=1 if compile_rounds > 1 else 0)
    calls = {variant: stepper(programs[variant], carry, batches, model_state) for variant, carry in calls.items()}
    times = in_turns(calls, rounds)
    return [
        {
            "model": name,
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
            "batch": [len(batch["labels"]) for batch in batches],
            "variant": variant,
            "ratio": ratio(times, variant, "plain"),
            "median_seconds": statistics.median(times[variant]),
            "compile_ratio": ratio(compile_times, variant, "plain"),
            "temporary_bytes": programs[variant].memory_analysis().temp_size_in_bytes,
            "rounds": rounds,
            **provenance(),
        }
        for variant in times
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=BATCHES, default=list(BATCHES))
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--compile-rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, help="examples for each objective, in place of the usual ones")
    parser.add_argument("--out", type=Path, default=FOLDER / "step_overhead.jsonl")
    arguments = parser.parse_args()
    keep_memory()
    rows = []
    for name in arguments.models:
        for size in [arguments.batch] if arguments.batch else BATCHES[name]:
            rows += measure(name, size, arguments.rounds, arguments.compile_rounds)
    store.replace(arguments.out, rows)
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
