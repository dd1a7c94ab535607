"""Trains a classifier and unlearns a part of its data, on every device of every process that takes part.

Command:  uv run python experiments/cloud/unlearn.py
          the same command in every process of a TPU slice, with --distributed; see README.md in this folder
Time:     about 20 seconds on 2 CPU cores, with the digits.
Result:   in --directory: checkpoints, rows.jsonl (losses and multipliers) and result.json (UA, RA, TA, MIA).

The same command again takes the run up where its checkpoints end, on any number of processes and devices. Exit status:
0 done; 75 (EX_TEMPFAIL) stopped by SIGTERM with a checkpoint; anything else is a fault.
"""

import hashlib
import json
import os
import shlex
import sys
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from etils import epath
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import eupmu_jax as eupmu
from eupmu_jax import data, metrics, sharding
from eupmu_jax.data import feed
from eupmu_jax.models import MLP
from eupmu_jax.objectives import cross_entropy, random_labels
from eupmu_jax.runtime import loop
from eupmu_jax.runtime.training import predict

PREEMPTED = os.EX_TEMPFAIL


class Settings(NamedTuple):
    """What the run is; a checkpoint of other settings is refused.

    Attributes:
      data: "digits" or "fashion_mnist".
      forget: A whole class, class:N, or a random share of the training set, random:10%.
      method: Surgery on stacked gradients, or by a multiplier.
      rise: By how much the retain loss may rise, in nats.
      train_steps, steps: Of the original model's training, and of unlearning.
      train_batch, forget_batch, retain_batch: Examples in a step, over all processes.
      learning_rate: Of unlearning.
      hidden: Width of the two hidden layers.
      seed: Of the split, the model, the order of the examples and the keys.
    """

    data: Literal["digits", "fashion_mnist"] = "digits"
    forget: str = "class:3"
    method: Literal["explicit", "implicit"] = "implicit"
    rise: float = 0.02
    train_steps: int = 1500
    steps: int = 200
    train_batch: int = 64
    forget_batch: int = 16
    retain_batch: int = 48
    learning_rate: float = 0.01
    hidden: int = 256
    seed: int = 0


class Stage(NamedTuple):
    """A part of the run, to be compiled for a mesh: its optimizer, its step, and the sets of examples it reads."""

    optimizer: optax.GradientTransformation
    step: Callable
    ids: list[np.ndarray]
    sizes: list[int]


def training(settings: Settings, apply: Callable, ids: np.ndarray) -> Stage:
    """Adam on the cross-entropy of the whole training set, with a cosine schedule."""
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-3, settings.train_steps))

    def step(params, state, batches, key):
        loss = lambda p: cross_entropy(apply(p, batches[0]["images"]), batches[0]["labels"])
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, {"loss": value}

    return Stage(optimizer, step, [ids], [settings.train_batch])


def unlearning(settings: Settings, apply: Callable, split: data.Split, num_classes: int) -> Stage:
    """Random labels for the forget set, drawn anew with the key of each step, under a limit for the retain loss."""

    def forget_loss(params, batch, key):
        return cross_entropy(apply(params, batch["images"]), random_labels(key, batch["labels"], num_classes))

    def retain_loss(params, batch, key):
        return cross_entropy(apply(params, batch["images"]), batch["labels"])

    losses = [forget_loss, retain_loss]
    if settings.method == "explicit":
        limit = eupmu.tolerances.budget(settings.rise, 1.0 / settings.learning_rate, relative_to_start=True)
        descent = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(settings.learning_rate))
        optimizer = eupmu.skip_nonfinite(optax.chain(eupmu.unilateral_surgery(limit), descent))
        surgery = eupmu.explicit_step(losses, optimizer)
    else:
        limit = eupmu.tolerances.budget(settings.rise, 1.0, relative_to_start=True)
        steered = eupmu.implicit_surgery(limit, eupmu.controllers.nu_pi(20.0, 2.0), proxy="level")
        optimizer = eupmu.skip_nonfinite(optax.chain(optax.adam(settings.learning_rate), steered))
        surgery = eupmu.implicit_step(losses, optimizer)

    def step(params, state, batches, key):
        params, state, values = surgery(params, state, batches, key)
        return params, state, {"losses": values, "multipliers": eupmu.multipliers(state)}

    sizes = [settings.forget_batch, settings.retain_batch]
    return Stage(optimizer, step, [split.forget_ids, split.retain_ids], sizes)


def compiled(stage: Stage, read: Callable, params: Any, mesh: Mesh, key: jax.Array) -> tuple:
    """The step, and the layout of its carry; no device of the mesh need be here."""
    carry = loop.layout(stage.optimizer, params, key, mesh)
    return loop.compile_step(stage.step, carry, feed.layout(read, stage.ids, stage.sizes, mesh)), carry


def description(advance: jax.stages.Compiled, carry: loop.Carry, mesh: Mesh) -> dict:
    """What a dry run prints: mesh, layout of the parameters, and bytes on each device."""
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
    """Writes a row for each call from process 0; rows of steps that are made again are replaced."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def record(count, values):
        rows[:] = [row for row in rows if row["step"] < count]
        rows.append({"step": count} | {name: value.tolist() for name, value in values.items()})
        if jax.process_index() == 0:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    return record


def identity(settings: Settings, dataset: data.Dataset, split: data.Split) -> dict:
    """The settings, and hashes of the examples and of which of them are forgotten."""
    content = hashlib.sha256(dataset.train_images.tobytes() + dataset.train_labels.tobytes()).hexdigest()
    return settings._asdict() | {"sha256": content, "split": data.digest(split)}


def unlearn(
    settings: Settings,
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

    Args:
        settings: What the run is.
        directory: For checkpoints and results, common to all processes: a path, or a URL such as gs://bucket/run.
        data_axis: Devices along the axis of the examples; all that model_axis leaves by default.
        model_axis: Devices along the axis of the parameters.
        save_every: Steps between checkpoints.
        log_every: Steps between rows.
        dry_run: Compile the step of unlearning, print its mesh, layout and memory, and stop.
        topology: A TPU slice to make the dry run for, v5e:4x4 say, on a machine without one that has libtpu.
        distributed: Join the other processes; on TPU and under Slurm JAX finds them by itself.
        coordinator: Address and port of process 0, where JAX does not find it by itself.
        processes: Number of processes, likewise.
        process: Number of this process, from 0, likewise.
    """
    if distributed or coordinator:
        jax.distributed.initialize(coordinator, processes, process)
    if topology and not dry_run:
        raise ValueError(f"topology: got {topology!r} for a run on the devices that are here; it needs --dry-run")
    devices = topologies.get_topology_desc(topology, platform="tpu").devices if topology else jax.devices()
    mesh = sharding.make_mesh(data_axis or len(devices) // model_axis, model_axis, devices=devices)
    dataset = data.load(settings.data, seed=settings.seed)
    split = data.split(dataset.train_labels, settings.forget, num_classes=dataset.num_classes, seed=settings.seed)
    sizes = (dataset.train_images[0].size, settings.hidden, settings.hidden, dataset.num_classes)
    graph, params = nnx.split(MLP(sizes, rngs=nnx.Rngs(settings.seed)))
    params = nnx.to_pure_dict(params)
    apply = lambda params, images: nnx.merge(graph, params)(images)
    stages = {
        "train": training(settings, apply, np.arange(len(dataset.train_labels))),
        "unlearn": unlearning(settings, apply, split, dataset.num_classes),
    }
    read = lambda ids: {"images": dataset.train_images[ids], "labels": dataset.train_labels[ids]}
    key = jax.random.key(settings.seed)
    if dry_run:
        print(json.dumps(description(*compiled(stages["unlearn"], read, params, mesh, key), mesh), indent=2))
        return 0

    out, first = epath.Path(directory), 0
    meta = identity(settings, dataset, split)
    for name, steps in (("train", settings.train_steps), ("unlearn", settings.steps)):
        stage = stages[name]
        progress = loop.run(
            compiled(stage, read, params, mesh, key)[0],
            loop.place(stage.optimizer, params, key, mesh),
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
    """Runs `unlearn`, and makes its result the exit status."""
    sys.exit(tyro.cli(tyro.conf.configure(tyro.conf.OmitArgPrefixes)(unlearn), description=__doc__))


if __name__ == "__main__":
    main()
