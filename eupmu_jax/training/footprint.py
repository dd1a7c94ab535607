"""The memory and the passes that a run would take, from the compiled step and without training."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from eupmu_jax import methods
from eupmu_jax._stack.frozen import mask_of, split
from eupmu_jax.methods.method import Settings
from eupmu_jax.methods.passes import examples_passed, terms_of
from eupmu_jax.sharding import batch_shardings
from eupmu_jax.tasks import Task, as_examples
from eupmu_jax.tasks._constants import bytes_of
from eupmu_jax.training import levels
from eupmu_jax.training._frozen import trainable
from eupmu_jax.training._inputs import Sets, batches_on, check_arguments, on_host
from eupmu_jax.training._step import jitted_step, parted
from eupmu_jax.training._way import passes_of_start, steered
from eupmu_jax.training.classes import classes_to_go
from eupmu_jax.training.mesh.placement import params_on, places_of, sharing


class Footprint(NamedTuple):
    """The memory and the passes of a run of `unlearn`.

    Attributes:
      arguments, temporary: Bytes of a compiled step on a device: its arguments (parameters including frozen ones,
        optimizer state, examples in memory), and its temporary buffers.
      outside: Bytes that the largest pass before or after the steps takes in addition to these arguments; 0 if there is
        none. It counts the examples of the pass (up to 500, or 2,000 at the end of EUPMU budget, whatever the batch
        sizes), a copy of the parameters, and temporary buffers.
      forward, backward: Examples passed through the model, as in the result of `unlearn`. The passes that find the
        level of a class to be forgotten, or a target without held-out data, are not counted: at most 16 for each of
        2,000 examples.
    """

    arguments: int
    temporary: int
    forward: int
    backward: int
    outside: int = 0

    @property
    def bytes(self) -> int:
        """In all, at any one time."""
        return self.arguments + max(self.temporary, self.outside)


def footprint(
    method: str,
    task: Task,
    params: chex.ArrayTree,
    forget: Any,
    retain: Any,
    held_out: Any = None,
    *,
    steps: int = 300,
    settings: Settings | None = None,
    forget_batch: int = 64,
    retain_batch: int = 192,
    frozen: "Any | Callable[[Any], Any] | None" = None,
    mesh: Mesh | None = None,
) -> Footprint:
    """The footprint of `unlearn` with the same arguments, on one device or on each device of a mesh.

    The devices of the mesh need not be there, see `mesh.topology`, unless the method runs the model before the steps,
    as SalUn does for its mask.

    >>> from eupmu_jax import tasks
    >>> data = {"inputs": jnp.ones((100, 8)), "labels": jnp.zeros(100, int)}
    >>> task = tasks.classification(lambda params, inputs: inputs @ params, num_classes=3)
    >>> found = footprint("weighted sum", task, jnp.zeros((8, 3)), data, data, steps=10)
    >>> found.backward, found.arguments > 2 * data["inputs"].nbytes
    (1640, True)
    """
    chosen = methods.method(method)
    settings = methods.resolve_settings(method, chosen, task, settings)
    sets = Sets(as_examples("forget", forget), as_examples("retain", retain), mesh)
    held_out = None if held_out is None else as_examples("held_out", held_out)
    batches = forget_batch, retain_batch
    counts = {"steps": steps, "forget_batch": forget_batch, "retain_batch": retain_batch}
    frozen = None if frozen is None else mask_of(params, frozen)
    check_arguments(task, params, sets, held_out, frozen, chosen.losses(task, settings), **counts)
    if mesh is not None:
        held_out, batches = on_host(held_out), batches_on(mesh, sets.counts, batches)
    fixed = _bytes_on_a_device(split(mask_of(params, frozen), params)[1], mesh)
    task, params, _ = trainable(task, params, frozen)
    task = task if mesh is None else sharing(task, mesh)
    measured = len(held_out) if chosen.steers and held_out is not None and "target" not in settings else 0
    asked = settings
    if chosen.transports:
        measured += len(sets.forget) + (0 if held_out is None else len(held_out))
    if chosen.steers:
        # No size depends on the value of the target.
        settings = steered(task, settings, 0.5, 0.0)
        measured += passes_of_start(task, sets.forget)
    terms, sizes = terms_of(sets.counts, steps, batches)
    start: Any = {"retain_loss": 0.0, "retain_error": 0.0}
    numbers, choices = parted(settings)
    procedure = chosen.make(task, terms._replace(**start), settings)
    key, positions = jax.random.key(0), tuple(np.arange(size) for size in sizes)
    prepared: Any = ()
    if procedure.prepare:
        # What is prepared lies where the parameters do, which cannot be put on devices that are not there.
        if mesh is not None and set(mesh.devices.flat) <= set(jax.devices()):
            params = jax.device_put(params, params_on(mesh, params))
        prepared = procedure.prepare(params, sets.forget, sets.retain, key)
    state = jax.eval_shape(procedure.init, params, prepared)
    compiled = jitted_step if frozen is None else jitted_step.__wrapped__
    take = compiled(chosen.make, task, terms, choices, sets.in_memory)
    if mesh is None:
        fed = sets.feed(task, key, 0, positions)
    else:
        fed, layout = sets.batches(positions), places_of(params, state, mesh)
        fed = jax.tree.map(_shape_of, fed, batch_shardings(fed, mesh))
        params, state = jax.tree.map(_shape_of, (params, state), layout)
        key, take = jax.eval_shape(lambda: key), jax.jit(take, donate_argnums=(0, 1), out_shardings=layout)
    if chosen.transports:
        targets = np.zeros(sizes[0], np.float32)
        prepared = prepared, targets if mesh is None else _shape_of(targets, batch_shardings(targets, mesh))
    extra = prepared, numbers, start, fed, np.int32(0), 0, key, key
    memory: Any = take.lower(params, state, *extra).compile().memory_analysis()  # type: ignore[attr-defined]
    forward, backward = examples_passed(procedure.cost, steps, sizes)
    passes = [*procedure.outside, *(_of_levels(task, params, sets, held_out, asked) if chosen.steers else ())]
    outside = max((_bytes_of(function, params, sets.forget, count) for function, count in passes), default=0)
    arguments = memory.argument_size_in_bytes + fixed
    return Footprint(arguments, memory.temp_size_in_bytes, forward + measured, backward, outside)


def _of_levels(task, params, sets, held_out, given):
    """The passes that find a target and those that check whether it was reached, in the form of `Procedure.outside`."""
    parts = sets.forget, sets.retain, held_out if held_out is not None else ()
    chunk = levels.chunk_of(task, params, sets.forget)
    found = [(functools.partial(levels.errors_and_losses, task), min(chunk, max(map(len, parts))))]
    aims = "target" not in given and task.unknown is not None
    if aims and (held_out is None or classes_to_go(task, sets.forget, sets.retain)):
        found.append((task.unknown, min(chunk, len(sets.forget))))
    return found


def _bytes_of(function, params, examples, count):
    """The bytes that a function of the parameters and `count` examples takes, compiled from their shapes alone."""
    batch = jax.tree.map(_shape_of, examples[np.zeros(1, int)])
    batch = jax.tree.map(lambda leaf: leaf.update(shape=(count, *leaf.shape[1:])), batch)
    params = jax.tree.map(lambda leaf: _shape_of(leaf, getattr(leaf, "sharding", None)), params)
    memory: Any = jax.jit(function).lower(params, batch).compile().memory_analysis()
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes


def _bytes_on_a_device(params, mesh):
    if mesh is None:
        return bytes_of(params)
    of_part = lambda leaf, place: _shape_of(leaf).update(shape=place.shard_shape(np.shape(leaf)))
    return bytes_of(jax.tree.map(of_part, params, params_on(mesh, params)))


def _shape_of(leaf, place=None):
    return jax.ShapeDtypeStruct(np.shape(leaf), jnp.result_type(leaf), sharding=place)
