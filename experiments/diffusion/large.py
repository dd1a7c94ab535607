"""Unlearning in large diffusion models on all devices of a machine: CIFAR-10, and the U-Net of Stable Diffusion 1.x.

Command:  uv run python experiments/diffusion/large.py cifar10 --forget 1
          uv run --extra diffusion python experiments/diffusion/large.py stable-diffusion --weights FOLDER
          --forget FORGET.npz --retain RETAIN.npz
          with --dry-run, either command compiles a step of EUPMU and prints its memory, without weights or data
Time:     --train-steps of training, which the U-Net of CIFAR-10 starts with, and --steps of unlearning.
Result:   in --out: checkpoints, a row in rows.jsonl, the unlearned parameters. Exit status 75: stopped by SIGTERM.

Never run at full size: weights, CIFAR-10 and such a machine were not available. It was run on tiny networks and random
numbers, on one device and on eight simulated ones. Rerun the same command to resume from the last checkpoint. FOLDER
has the folders `unet` and `text_encoder` of the published layout. FORGET.npz and RETAIN.npz have `latents`, as from
`stable_diffusion.latents`, and the `tokens` of their captions, `(n, 77)`, as from the published tokenizer. Every device
holds the embeddings of all distinct captions, 0.24 MB each. Parameters are float32; the networks compute in bfloat16.
The U-Net of CIFAR-10 is the one that `eupmu plan --model ddpm-cifar10` compiles, somewhat smaller than DDPM's and
without dropout.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Set before JAX is imported: pass the original model to each program instead of embedding it.
    os.environ.setdefault("JAX_USE_SIMPLIFIED_JAXPR_CONSTANTS", "1")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

import eupmu_jax as eupmu
from eupmu_jax import data, methods, sharding
from eupmu_jax.benchmark import rows
from eupmu_jax.methods.passes import terms_of
from eupmu_jax.models import stable_diffusion as sd
from eupmu_jax.tasks import Examples
from eupmu_jax.training import checkpoints, loop
from eupmu_jax.training.mesh import feed, placement, topology
from experiments import origin
from experiments.diffusion import denoisers
from experiments.diffusion.denoisers import CIFAR10

# Training as in Ho et al. 2020: learning rate and its warm-up steps, gradient norm, decay of the moving average.
RATE, WARM, NORM, AVERAGE = 2e-4, 5_000, 1.0, 0.9999
# The axes of the mesh that parameters are sharded over.
AXES = ("data", "model")
# Learning rates as in SalUn's code, untested here. The limit follows from the target.
SETTINGS = {CIFAR10: {"learning_rate": 1e-4}, "stable-diffusion": {"learning_rate": 1e-5}}


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parses the arguments of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="model", required=True)
    cifar10, diffusion = (commands.add_parser(name) for name in SETTINGS)
    cifar10.add_argument("--forget", type=int, choices=range(denoisers.CLASSES), default=0, help="the class")
    cifar10.add_argument("--train-steps", type=int, default=800_000)
    for name in ("weights", "forget", "retain"):
        diffusion.add_argument(f"--{name}", type=Path)
    for command, batch in ((cifar10, 128), (diffusion, 16)):
        command.add_argument("--method", default="EUPMU")
        command.add_argument("--settings", type=json.loads, default={}, help="of the method, as JSON")
        command.add_argument("--steps", type=int, default=1_000)
        command.add_argument("--batch", type=int, default=batch, help="of each set, over all devices")
        command.add_argument("--save-every", type=int, default=200)
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--data-axis", type=int, help="all devices that --model-axis leaves")
        command.add_argument("--model-axis", type=int, default=1)
        command.add_argument("--dry-run", action="store_true")
        command.add_argument("--topology", help="of a dry run, v5e:4x4 or cpu:8, with devices that need not be here")
        command.add_argument("--out", type=Path, default=Path("eupmu_runs/large"))
    given = parser.parse_args(arguments)
    if given.topology and not given.dry_run:
        parser.error(f"--topology: got {given.topology} for a run on the devices that are here; it needs --dry-run")
    if given.dry_run and given.method != "EUPMU":
        parser.error(f"--method: got {given.method}, expected EUPMU, whose step --dry-run compiles")
    if given.model != CIFAR10 and not given.dry_run and None in (given.weights, given.forget, given.retain):
        parser.error("--weights, --forget, --retain: expected all three, or --dry-run")
    return given


def averaged(decay: float) -> optax.GradientTransformation:
    """Keeps a moving average of the parameters as its state; must be last in a chain."""

    def update(updates, state, params):
        now = optax.apply_updates(params, updates)
        rate = jnp.minimum(decay, (1 + state.count) / (10 + state.count))
        return updates, optax.EmaState(state.count + 1, optax.incremental_update(now, state.ema, 1 - rate))

    return optax.GradientTransformation(lambda params: optax.EmaState(jnp.zeros((), jnp.int32), params), update)


def trained(given: argparse.Namespace, made: denoisers.Denoiser, mesh: Mesh, tree: dict) -> Any:
    """Trains on all images and their mirror images, resuming if interrupted; returns the averaged parameters."""
    task, ids = denoisers.task_of(made, mesh, given.batch), [np.arange(len(tree["labels"]))]
    rate = optax.linear_schedule(0, RATE, WARM)
    optimizer = optax.chain(optax.clip_by_global_norm(NORM), optax.adam(rate), averaged(AVERAGE))
    fresh = jax.jit(lambda key: nnx.to_pure_dict(nnx.state(denoisers.unet(key), nnx.Param)))

    def step(params, state, batches, key):
        flips, noise = jax.random.split(key)
        flipped = jax.random.bernoulli(flips, shape=(given.batch, 1, 1, 1))
        x = batches[0]["inputs"]
        batch = batches[0] | {"inputs": jnp.where(flipped, x[:, :, ::-1], x)}
        loss, slopes = jax.value_and_grad(lambda params: task.retain(task.outputs(params, batch, noise), batch))(params)
        updates, state = optimizer.update(slopes, state, params)
        return optax.apply_updates(params, updates), state, loss

    read, key = lambda chosen: jax.tree.map(lambda leaf: leaf[chosen], tree), jax.random.key(given.seed)
    carry = placement.layout(optimizer, made.params, key, mesh)
    ended = loop.run(
        placement.compile_step(step, carry, feed.layout(read, ids, [given.batch], mesh)),
        placement.place(optimizer, fresh(key), key, mesh),
        feed.batches(read, ids, [given.batch], mesh, seed=given.seed),
        steps=given.train_steps,
        directory=given.out / "train",
        meta={"model": given.model, "seed": given.seed, "batch": given.batch, "steps": given.train_steps},
        save_every=given.save_every,
        log=lambda count, loss: print(f"step {count} of training, loss {loss:.4f}", flush=True),
        log_every=given.save_every,
    )
    if ended.preempted:
        raise InterruptedError(f"SIGTERM after step {ended.step} of training, which is saved; run again to go on")
    return ended.carry.state[-1].ema


def compiled(given: argparse.Namespace, made: denoisers.Denoiser, mesh: Mesh) -> dict:
    """The memory of a step of EUPMU on each device of a mesh, compiled from shapes alone."""
    place = lambda tree, at: jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, at)
    terms = terms_of((given.batch, given.batch), given.steps, (given.batch, given.batch))[0]
    chosen = methods.method("EUPMU")
    table = (
        None
        if given.model == CIFAR10
        else jax.ShapeDtypeStruct((3, denoisers.TEXT.length, denoisers.UNET.context), jnp.float32)
    )
    key = jax.eval_shape(lambda: jax.random.key(0))

    def procedure(original, table):
        task = denoisers.task_of(made, mesh, given.batch, original, table)
        settings = methods.default_settings(chosen, task) | SETTINGS[given.model] | {"target": 1.0} | given.settings
        return chosen.make(task, terms, settings)

    def step(params, state, original, table, batches, key):
        return procedure(original, table).step(params, original, state, batches, jnp.int32(0), key)

    state = jax.eval_shape(lambda params, table: procedure(params, table).init(params, params), made.params, table)
    params = place(made.params, sharding.param_shardings(made.params, mesh, axes=AXES))
    layout = placement.places_of(params, state, mesh)
    params, state = place((params, state), layout)
    inputs = jax.ShapeDtypeStruct((given.batch, *made.shape), jnp.float32)
    batch = {"inputs": inputs, "labels": jax.ShapeDtypeStruct((given.batch,), jnp.int32)}
    batches = place((batch, batch), sharding.batch_shardings((batch, batch), mesh))
    jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=layout)
    memory = jitted.lower(params, state, params, table, batches, key).compile().memory_analysis()
    arguments, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    numbers = sum(leaf.size for leaf in jax.tree.leaves(made.params))
    figures = {"parameters": numbers, "device": mesh.devices.flat[0].device_kind, "mesh": dict(mesh.shape)}
    return figures | {"bytes_per_device": {"arguments": arguments, "temporary": temporary}}


def run(given: argparse.Namespace, made_by: dict) -> dict:
    """Unlearns and returns the row, or in a dry run the memory of a step."""
    devices = topology.devices(given.topology)[0] if given.topology else jax.devices()
    if not 1 <= given.model_axis <= len(devices):
        raise ValueError(f"model_axis: got {given.model_axis}, expected 1 to the number of devices, {len(devices)}")
    mesh = sharding.make_mesh(given.data_axis or len(devices) // given.model_axis, given.model_axis, devices=devices)
    made = denoisers.denoiser(given.model)
    if given.dry_run:
        return compiled(given, made, mesh)
    if given.model == CIFAR10:
        loaded = data.load(CIFAR10)
        tree, table = {"inputs": 2 * loaded.train_images - 1, "labels": loaded.train_labels}, None
        forgotten = loaded.train_labels == given.forget
        forget, retain = (Examples(tree, np.flatnonzero(part)) for part in (forgotten, ~forgotten))
        original = trained(given, made, mesh, tree)
    else:
        forget, retain, table = denoisers.captioned(given.weights, given.forget, given.retain)
        original = sd.load(given.weights, made.model)
    # Sharded over all devices as in the steps: each holds its share of parameters and moments.
    original = jax.device_put(original, sharding.param_shardings(original, mesh, axes=AXES))
    task = denoisers.task_of(made, mesh, given.batch, original, None if table is None else jnp.asarray(table))
    settings = methods.default_settings(methods.method(given.method), task) | SETTINGS[given.model] | given.settings
    options = {"forget_batch": given.batch, "retain_batch": given.batch, "save_every": given.save_every, "probes": 1}
    options |= {"steps": given.steps, "seed": given.seed, "mesh": mesh, "directory": given.out / "run"}
    result = eupmu.unlearn(given.method, task, original, forget, retain, settings=settings, **options)
    row = {"model": given.model, "method": given.method, "forget": str(given.forget), "settings": settings}
    row |= {"seed": given.seed, "steps": given.steps, "mesh": dict(mesh.shape), "seconds": result.seconds}
    row |= {"figures": result.figures}
    if result.level is not None:
        row |= {"target": result.level.target, "limit": result.level.limit, "kept": bool(result.level.kept)}
    checkpoints.save(given.out / "params", result.params, {"model": given.model, "method": given.method})
    rows.append(given.out / "rows.jsonl", row | made_by)
    return row


def main():
    try:
        print(json.dumps(run(parsed(), origin.of(__file__, *sys.argv[1:])), indent=2))
    except InterruptedError as stopped:
        print(stopped, flush=True)
        sys.exit(os.EX_TEMPFAIL)


if __name__ == "__main__":
    main()
