"""`eupmu plan`: compiles one step for devices that you need not have, and reports its cost."""

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich import box
from rich.console import Console
from rich.table import Table

from eupmu_jax._stack.jaxpr import matmul_flops
from eupmu_jax.benchmark import rows
from eupmu_jax.commands._command_line import command_line
from eupmu_jax.commands.plan_models import MODELS, planned
from eupmu_jax.gradients.accumulation import accumulate
from eupmu_jax.models.decoder import SIZES
from eupmu_jax.sharding import batch_shardings, state_shardings
from eupmu_jax.surgery.eupmu import eupmu
from eupmu_jax.surgery.explicit import unilateral_surgery
from eupmu_jax.surgery.steps import explicit_step, implicit_step
from eupmu_jax.surgery.two_pass import two_pass
from eupmu_jax.training.mesh import program, topology


def _plain(loss, shardings):
    """A training step: one gradient of the loss over the forget and the retain batch together."""
    optimizer = optax.adam(1e-5)

    def step(params, state, batches):
        whole = jax.tree.map(lambda *parts: jnp.stack(parts), *batches)
        value, grads = jax.value_and_grad(lambda p: jax.vmap(lambda batch: loss(p, batch))(whole).mean())(params)
        updates, state = optimizer.update(jax.lax.with_sharding_constraint(grads, shardings), state, params)
        return optax.apply_updates(params, updates), state, value

    return optimizer, step


def _explicit(loss, shardings, wrap=lambda chain: chain, **options):
    optimizer = wrap(optax.chain(unilateral_surgery(), optax.adam(1e-5)))
    return optimizer, explicit_step(loss, optimizer, mode="vmap", shardings=shardings, **options)


def _two_pass(loss, shardings):
    both = two_pass(loss, optax.adam(1e-5), shardings=shardings)
    return both, both.step


def _implicit(loss, shardings):
    optimizer = eupmu(1e-5, momentum=0.9)
    return optimizer, implicit_step(loss, optimizer, mode="vmap")


ADVICE = "use a larger topology, a larger tensor, a smaller batch or sequence, or the steps two-pass or explicit-bf16"
# Each step by name: a function that makes its optimizer (anything with an `init`) and the step.
STEPS: dict[str, Callable] = {
    "plain": _plain,
    "explicit": _explicit,
    "explicit-bf16": lambda loss, shardings: _explicit(loss, shardings, gradient_dtype=jnp.bfloat16),
    "explicit-microbatches": lambda loss, shardings: _explicit(loss, shardings, lambda chain: accumulate(chain, 4)),
    "two-pass": _two_pass,
    "implicit": _implicit,
}


def make(
    name: str, model: str, step: str, *, data: int, tensor: int, batch: int, sequence: int, adapters: int = 0
) -> dict[str, Any]:
    """Compiles `step` for a model on a topology; returns a row of figures.

    Args:
      name: A topology, see `training.mesh.topology.devices`.
      model: One of `MODELS`; computed in bfloat16, parameters and optimizer state in float32.
      step: A key of `STEPS`.
      data, tensor: Devices along the mesh axes `data` and `model`; a `data` of 0 uses all that `tensor` leaves.
      batch: Sequences or images for each of the two objectives.
      sequence: Tokens per sequence, for a decoder.
      adapters: Rank of low-rank adapters that are trained instead of a decoder's parameters; 0 for none.

    Returns:
      A row: sizes in bytes on each device, collectives by kind as `[count, bytes received]`, `flops` on each device,
      and for a TPU the seconds that compute, memory and network would each take at their peak rates.

    Raises:
      ValueError: For an unknown model or step, a number that is not positive, a mesh that does not fit the topology,
        the batch or the model, or a step that needs more memory than a chip has.
    """
    for argument, value, known in (("model", model, MODELS), ("step", step, STEPS)):
        if value not in known:
            raise ValueError(f"{argument}: got {value!r}, expected one of {', '.join(known)}")
    for argument, count in (("batch", batch), ("sequence", sequence)):
        if not 1 <= count <= topology.LARGEST:
            raise ValueError(f"{argument}: got {count}, expected a number from 1 to {topology.LARGEST:,}")
    if not 0 <= adapters <= topology.LARGEST:
        raise ValueError(f"adapters: got {adapters}, expected a rank from 0 to {topology.LARGEST:,}")
    mesh, chip = topology.mesh_of(name, data, tensor)
    params, shardings, loss, shapes, examples, fixed = planned(model, mesh, batch, sequence, adapters)
    optimizer, _ = STEPS[step](loss, shardings)

    def update(params, state, batches, fixed):
        return STEPS[step](lambda params, batch: loss(params, batch, fixed), shardings)[1](params, state, batches)

    layout = (shardings, state_shardings(optimizer, params, shardings))
    batches = (shapes, shapes)
    place = lambda tree, to: jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, to)
    arguments = (
        *place((params, jax.eval_shape(optimizer.init, params)), layout),
        place(batches, batch_shardings(batches, mesh)),
        fixed,
    )
    start = time.perf_counter()
    lowered = jax.jit(update, donate_argnums=(0, 1), out_shardings=(*layout, None)).lower(*arguments)
    with topology.fitting(ADVICE):
        compiled: Any = lowered.compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    found = program.collectives(compiled.as_text())
    row = {
        "topology": name,
        "model": model,
        "step": step,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves((params, fixed))),
        "adapters": adapters,
        "mesh": {"data": mesh.shape["data"], "tensor": tensor},
        "batch": [batch, batch],
        "sequence": sequence if model in SIZES else None,
        "examples": examples,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "bytes": memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes,
        "limit_bytes": chip and chip.memory,
        "collectives": {
            kind: [sum(c.times for c in found if c.kind == kind), sum(c.received for c in found if c.kind == kind)]
            for kind in program.KINDS
        },
        "gram_all_reduces": sum(c.times for c in found if c.kind == "all-reduce" and "f32[3]" in _parts(c.shape)),
        "flops": matmul_flops(update, *arguments) / mesh.size,
        "compile_seconds": seconds,
        **rows.provenance(command_line(), mesh.devices.flat[0].device_kind),
    }
    return row | {"roofline_seconds": chip and _roofline(row, chip)}


def show(row: dict[str, Any], out: Path | None, console: Console) -> None:
    """Prints the figures of a row, and appends it to the JSON Lines file `out`."""
    mesh = row["mesh"]
    size = f"{row['parameters']:,} parameters" + (f", adapters of rank {row['adapters']}" if row["adapters"] else "")
    table = Table(
        title=f"{row['step']} step, {_name(row['model'])} ({size}) on {row['topology']}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_header=False,
    )
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    add = lambda *cells: table.add_row(*cells)
    add("mesh", f"data {mesh['data']} x tensor {mesh['tensor']}")
    add("batch", f"{row['batch'][0]} forget + {row['batch'][1]} retain {row['examples']}")
    limit = f" of {_readable(row['limit_bytes'])}" if row["limit_bytes"] else ""
    add("memory on a device", f"{_readable(row['bytes'])}{limit}")
    add("  arguments, temporary", f"{_readable(row['argument_bytes'])}, {_readable(row['temporary_bytes'])}")
    for kind, (count, received) in row["collectives"].items():
        if count:
            add(kind, f"{count:,} a step, {_readable(received)} received by a device")
            if kind == "all-reduce" and row["step"].startswith("explicit"):
                add("  of which for the surgery", f"{row['gram_all_reduces']} all-reduce of 3 numbers")
    add("matrix products", f"{_readable(row['flops'], 'FLOP')} on a device")
    if row["roofline_seconds"]:
        times = row["roofline_seconds"]
        add("at the chip's peaks", ", ".join(f"{name} {1e3 * value:.3g}" for name, value in times.items()) + " ms")
        add("so a step takes at least", f"{1e3 * max(times.values()):.3g} ms, bound by {max(times, key=times.get)}")
    add("compiled in", f"{row['compile_seconds']:.0f} s")
    console.print(table)
    if out is not None:
        rows.append(out, row)


def _parts(shape):
    """The shapes of a collective, which XLA may have combined from several, such as `(f32[3], f32[2])`."""
    return re.findall(r"\w+\[[\d,]*\]", shape)


def _name(model):
    return f"{model} decoder" if model in SIZES else model


def _readable(count, unit="B"):
    for prefix in ("", "k", "M", "G", "T"):
        if count < 1000 or prefix == "T":
            return f"{count:.3g} {prefix}{unit}"
        count /= 1000


def _roofline(row, chip):
    """Seconds at peak rates. Memory is a lower bound: arguments and temporaries are each read and written once."""
    return {
        "compute": row["flops"] / chip.flops,
        "memory": (2 * row["argument_bytes"] + 2 * row["temporary_bytes"]) / chip.memory_bandwidth,
        "network": sum(received for _, received in row["collectives"].values()) / chip.network_bandwidth,
    }
