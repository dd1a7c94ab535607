"""Trains a classifier and unlearns a part of its data, on every device of every process that takes part.

Command:  uv run python experiments/cloud/unlearn.py
          the same command in every process of a TPU slice, with --distributed; see README.md in this folder
Time:     about 20 seconds on 2 CPU cores, with the digits.
Result:   in --directory: checkpoints, train.jsonl, unlearn.jsonl (losses, multipliers), result.json (UA, RA, TA, MIA).

Rerun the same command to resume from the last checkpoint, on any number of processes and devices. Exit status: 0 done;
75 (EX_TEMPFAIL) stopped by SIGTERM with a checkpoint; anything else is a fault.
"""

import json
import os
import shlex
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import stages
import tyro
from etils import epath
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from eupmu_jax import data, metrics, sharding
from eupmu_jax.benchmark import rows as saved_rows
from eupmu_jax.models import MLP
from eupmu_jax.training import loop
from eupmu_jax.training.fitting import predict
from eupmu_jax.training.mesh import feed, placement
from eupmu_jax.training.mesh import topology as topologies

PREEMPTED = os.EX_TEMPFAIL


def compiled(stage: stages.Stage, read: Callable, params: Any, mesh: Mesh, key: jax.Array) -> tuple:
    """The compiled step and the layout of its carry; the devices of the mesh may be absent."""
    carry = placement.layout(stage.optimizer, params, key, mesh)
    return placement.compile_step(stage.step, carry, feed.layout(read, stage.ids, stage.sizes, mesh)), carry


def description(advance: jax.stages.Compiled, carry: placement.Carry, mesh: Mesh) -> dict:
    """The output of a dry run: mesh, layout of the parameters, and bytes on each device."""
    memory = advance.memory_analysis()
    leaves = jax.tree_util.tree_flatten_with_path(carry.params)[0]
    return {
        "processes": len({device.process_index for device in mesh.devices.flat}),
        "mesh": dict(mesh.shape),
        "device": mesh.devices.flat[0].device_kind,
        "params": {jax.tree_util.keystr(path): [leaf.shape, str(leaf.sharding.spec)] for path, leaf in leaves},
        "bytes_per_device": {
            "arguments": memory.argument_size_in_bytes,
            "of these donated": memory.alias_size_in_bytes,
            "outputs": memory.output_size_in_bytes,
            "temporary": memory.temp_size_in_bytes,
        },
    }


def recorder(path: epath.Path) -> Callable[[int, Any], None]:
    """Writes a row for each call from process 0; rows of repeated steps are replaced."""
    rows = saved_rows.read(path)

    def record(count, values):
        rows[:] = [row for row in rows if row["step"] < count]
        rows.append({"step": count} | {name: value.tolist() for name, value in values.items()})
        if jax.process_index() == 0:
            # Written aside and renamed, so that a kill leaves the rows intact.
            unfinished = path.with_suffix(".unfinished")
            unfinished.write_text("".join(json.dumps(row) + "\n" for row in rows))
            unfinished.replace(path)

    return record


def unlearn(
    settings: stages.Settings,
    directory: str = "eupmu_runs/cloud",
    data_axis: int | None = None,
    model_axis: int = 1,
    save_every: int = 100,
    log_every: int = 10,
    dry_run: bool = False,
    topology: str | None = None,
    distributed: bool = False,
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
) -> int:
    """Trains a classifier and unlearns a part of its data, on all devices of all processes.

    Rerun the same command to resume from the last checkpoint, on any number of processes and devices. Exit status: 0
    done; 75 stopped by SIGTERM with a checkpoint; anything else is a fault.

    Args:
        settings: The settings of the run.
        directory: For checkpoints and results, common to all processes: a path, or a URL such as gs://bucket/run.
        data_axis: Devices along the axis of the examples; all that model_axis leaves by default.
        model_axis: Devices along the axis of the parameters.
        save_every: Steps between checkpoints.
        log_every: Steps between rows.
        dry_run: Compile the step of unlearning, print its mesh, layout and memory, and stop.
        topology: Devices to make the dry run for that need not be here: v5e:4x4 (with the extra tpu), or cpu:8.
        distributed: Join the other processes; on TPU and under Slurm JAX finds them by itself.
        coordinator: Address and port of process 0, where JAX does not find it by itself.
        processes: Number of processes, likewise.
        process: Number of this process, from 0, likewise.
    """
    if distributed or coordinator:
        jax.distributed.initialize(coordinator, processes, process)
    if topology and not dry_run:
        raise ValueError(f"topology: got {topology!r} for a run on the devices that are here; it needs --dry-run")
    devices = topologies.devices(topology)[0] if topology else jax.devices()
    if not 1 <= model_axis <= len(devices):
        raise ValueError(f"model_axis: got {model_axis}, expected 1 to the number of devices, {len(devices)}")
    mesh = sharding.make_mesh(data_axis or len(devices) // model_axis, model_axis, devices=devices)
    dataset = data.load(settings.data, seed=settings.seed)
    split = data.split(dataset.train_labels, settings.forget, num_classes=dataset.num_classes, seed=settings.seed)
    sizes = (dataset.train_images[0].size, settings.hidden, settings.hidden, dataset.num_classes)
    graph, params = nnx.split(MLP(sizes, rngs=nnx.Rngs(settings.seed)))
    params = nnx.to_pure_dict(params)
    apply = lambda params, images: nnx.merge(graph, params)(images)
    training = stages.training(settings, apply, np.arange(len(dataset.train_labels)))
    unlearning = stages.unlearning(settings, apply, split, dataset.num_classes)
    read = lambda ids: {"images": dataset.train_images[ids], "labels": dataset.train_labels[ids]}
    key = jax.random.key(settings.seed)
    if dry_run:
        print(json.dumps(description(*compiled(unlearning, read, params, mesh, key), mesh), indent=2))
        return 0

    out, first = epath.Path(directory), 0
    meta = stages.identity(settings, dataset, split)
    for name, stage, steps in (("train", training, settings.train_steps), ("unlearn", unlearning, settings.steps)):
        progress = loop.run(
            compiled(stage, read, params, mesh, key)[0],
            placement.place(stage.optimizer, params, key, mesh),
            feed.batches(read, stage.ids, stage.sizes, mesh, seed=settings.seed),
            directory=out / name,
            meta=meta,
            steps=steps,
            first=first,
            save_every=save_every,
            log=recorder(out / f"{name}.jsonl"),
            log_every=log_every,
        )
        if progress.preempted:
            print(f"stopped by SIGTERM before step {progress.step} ({name}), which is saved; to go on:")
            print(shlex.join(["python", *sys.argv]), flush=True)
            return PREEMPTED
        params, first = progress.carry.params, first + steps

    params = jax.jit(lambda leaf: leaf, out_shardings=NamedSharding(mesh, PartitionSpec()))(params)
    if jax.process_index() == 0:
        params = jax.tree.map(jnp.asarray, jax.device_get(params))
        logits = [predict(apply, params, jnp.asarray(part)) for part in (dataset.train_images, dataset.test_images)]
        result = metrics.evaluate(*logits, dataset, split, settings.seed)
        (out / "result.json").write_text(json.dumps(result) + "\n")
        print(json.dumps(result))
    return 0


def main() -> None:
    """Runs `unlearn` and exits with its result as the status."""
    sys.exit(tyro.cli(tyro.conf.configure(tyro.conf.OmitArgPrefixes)(unlearn)))


if __name__ == "__main__":
    main()
