"""Where the time of an explicit step goes, from XLA's own profiler.

Command:  uv run python experiments/speed/profile_step.py
Time:     about a minute on 2 CPU cores.
Result:   rows in experiments/speed/profile_step.jsonl.

Operations are classified by what was traced into them. XLA fuses the combination of the rows with SGD and the new
parameters, which a plain step writes as well: that pass counts as surgery. Times are summed over the threads that ran
an operation, so shares are of work, not of wall-clock time.
"""

import argparse
import collections
import re
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.table import Table

import eupmu_jax as eupmu
from eupmu_jax.benchmark import rows as store
from experiments.speed.step_overhead import BATCHES, LEARNING_RATE, problem
from experiments.speed.timing import FOLDER, keep_memory, provenance

KINDS = ("matrix products", "other model", "surgery", "optimizer")


def named(name: str, optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`optimizer` with its operations traced under a name."""
    optimizer = optax.with_extra_args_support(optimizer)
    return optax.GradientTransformationExtraArgs(optimizer.init, jax.named_scope(f"part_{name}")(optimizer.update))


def kinds(program: str) -> dict[str, str]:
    """The kind of each instruction of a compiled program."""
    bodies = dict(re.findall(r"^%?([\w.-]+) \([^\n]*\{\n(.*?)^\}", program, re.MULTILINE | re.DOTALL))
    found = {}
    for name, line in re.findall(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*)$", program, re.MULTILINE):
        inside = "".join(bodies.get(called, "") for called in re.findall(r"calls=%?([\w.-]+)", line)) + line
        parts = set(re.findall(r"part_(\w+)", inside))
        is_product = re.search(r" (dot|convolution)\(|dot_general|conv_general", inside)
        model = "matrix products" if is_product else "other model"
        found[name] = next((kind for kind in ("surgery", "optimizer") if kind in parts), model)
    return found


def measure(name: str, size: int, mode: str, steps: int) -> list[dict]:
    """Rows of one model and mode: seconds of work a step by kind."""
    loss, params, statistics_, make_batch = problem(name, size)
    chain = optax.chain(named("surgery", eupmu.unilateral_surgery()), optax.sgd(LEARNING_RATE))
    optimizer = named("optimizer", eupmu.skip_nonfinite(chain))
    step = eupmu.explicit_step(loss, optimizer, has_aux=True, mode=mode)
    carry = params, optimizer.init(params)
    inputs = (make_batch(0), make_batch(1)), statistics_
    program = jax.jit(step, donate_argnums=(0, 1)).lower(*carry, *inputs).compile()
    known = kinds(program.as_text())
    carry = jax.tree.map(jnp.array, carry)
    *carry, _ = program(*carry, *inputs)
    jax.block_until_ready(carry)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(steps):
                *carry, _ = program(*carry, *inputs)
            jax.block_until_ready(carry)
        data = jax.profiler.ProfileData.from_file(str(next(Path(folder).rglob("*.xplane.pb"))))
        seconds: dict[str, float] = collections.defaultdict(float)
        for event in (event for plane in data.planes for line in plane.lines for event in line.events):
            if event.name in known:
                seconds[known[event.name]] += 1e-9 * event.duration_ns
    return [
        {
            "model": name,
            "batch": [size, size],
            "variant": mode,
            "kind": kind,
            "share": seconds[kind] / sum(seconds.values()),
            "seconds": seconds[kind] / steps,
            "rounds": steps,
            "seed": 0,
            **provenance(),
        }
        for kind in KINDS
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=BATCHES, default=["mlp", "transformer", "resnet20"])
    parser.add_argument("--batch", type=int, help="examples for each objective, in place of the usual ones")
    parser.add_argument("--rounds", type=int, default=20, help="steps")
    parser.add_argument("--out", type=Path, default=FOLDER / "profile_step.jsonl")
    arguments = parser.parse_args()
    keep_memory()
    rows = []
    table = Table("model", "mode", *KINDS)
    for name in arguments.models:
        for mode in ("unroll", "vmap"):
            found = measure(name, arguments.batch or BATCHES[name][-1], mode, arguments.rounds)
            table.add_row(name, mode, *(f"{100 * row['share']:.1f} %" for row in found))
            rows += found
    store.replace(arguments.out, rows)
    Console().print(table)


if __name__ == "__main__":
    main()
