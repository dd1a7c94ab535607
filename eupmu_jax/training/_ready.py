"""A run of a method before its first step: checks and prepares the arguments of `unlearn`."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import numpy as np
from jax.sharding import Mesh

from eupmu_jax import methods
from eupmu_jax._stack.frozen import mask_of, split
from eupmu_jax.methods.method import Method, Procedure, Settings, Terms
from eupmu_jax.methods.passes import terms_of
from eupmu_jax.tasks import Task, as_examples
from eupmu_jax.training import _warn
from eupmu_jax.training._aim import Aim, aim_of, checked_start
from eupmu_jax.training._faults import check_folder, check_readable, check_storage, make_folder
from eupmu_jax.training._frozen import trainable
from eupmu_jax.training._identity import (
    digest_of_examples,
    digest_of_losses,
    digest_of_model,
    identity,
    without_addresses,
)
from eupmu_jax.training._inputs import Sets, batches_on, check_arguments, check_start, check_storable, on_host
from eupmu_jax.training._watch import retain_figures
from eupmu_jax.training._way import passes_of_start, steered
from eupmu_jax.training.levels import check_told
from eupmu_jax.training.mesh.placement import params_on, sharing
from eupmu_jax.training.rounds import check_open_ended, rounds_of
from eupmu_jax.training.targets import targets_of


class Ready(NamedTuple):
    """A run that is ready to begin.

    Attributes:
      chosen, settings, procedure: The method, all its settings including the target, and its procedure.
      task, params: The task and the parameters without frozen leaves.
      whole: Maps such parameters to those of the whole model.
      sets, held_out: The examples.
      aim: The target of a method that steers to a level; else None.
      targets: The target score of each example to be forgotten, for a method that transports; else None.
      terms, sizes: The terms of the run, and the sizes of a forget and a retain batch.
      start: Figures of the original model, as in `Terms`.
      meta: Metadata that identifies the checkpoints of the run; empty if none are saved.
    """

    chosen: Method
    settings: Settings
    procedure: Procedure
    task: Task
    params: chex.ArrayTree
    whole: Callable
    sets: Sets
    held_out: Any
    aim: Aim | None
    targets: np.ndarray | None
    terms: Terms
    sizes: tuple[int, int]
    start: Mapping[str, float]
    meta: dict


def ready(
    method: str,
    task: Task,
    params: chex.ArrayTree,
    data: tuple[Any, Any, Any],
    counts: dict[str, Any],
    *,
    budget: int | None,
    settings: Settings | None,
    frozen: Any,
    mesh: Mesh | None,
    directory: "str | Path | None",
    start: "Mapping[str, float] | None",
) -> Ready:
    """Checks and prepares the arguments of `unlearn`.

    `data` holds the forget, retain and held-out examples, `counts` all integer arguments; its `steps` may be None.

    Raises:
      ValueError: See `unlearn`.
    """
    chosen = methods.method(method)
    asked = methods.resolve_settings(method, chosen, task, settings)
    sets = Sets(as_examples("forget", data[0]), as_examples("retain", data[1]), mesh)
    held_out = None if data[2] is None else as_examples("held_out", data[2])
    held_out = held_out if mesh is None else on_host(held_out)
    losses = chosen.losses(task, asked)
    frozen = None if frozen is None else mask_of(params, frozen)
    check_open_ended(method, chosen, counts["steps"], budget)
    checked = counts | ({"steps": 1} if counts["steps"] is None else {})
    check_arguments(task, params, sets, held_out, frozen, losses, **checked)
    _warn.of_overlap(sets, held_out)
    _warn.of_narrow(params, frozen)
    _warn.of_large_frozen(params, frozen)
    if directory is not None:
        check_readable("directory", directory)
        check_storage("directory", directory)
        if "://" not in str(directory):
            check_folder("directory", directory)
    given: dict[str, Any] = {} if start is None else {"start": check_start(start)}
    loss = task.forget.get(str(asked.get("forget_objective")))
    if isinstance(loss, functools.partial):
        given["constants"] = {name: without_addresses(repr(value)) for name, value in loss.keywords.items()}
    batches = counts["forget_batch"], counts["retain_batch"]
    # The identity covers all parameters as given, and which of them are frozen.
    every = params if frozen is None else (params, split(frozen, params)[0])
    if mesh is not None:
        batches = batches_on(mesh, sets.counts, batches)
        # Arrays committed to one device, as in a restored checkpoint, cannot be combined with those on the mesh.
        params = jax.device_put(params, params_on(mesh, params))
    if directory is not None:
        given["model"] = digest_of_model(task, params, sets.forget)
        reads = "divergence" in chosen.requires, chosen.transports
        given["losses"] = digest_of_losses(task, params, sets.forget, losses, *reads)
    task, params, whole = trainable(task, params, frozen)
    task = task if mesh is None else sharing(task, mesh)
    if directory is not None:
        check_storable(params)
        if "://" not in str(directory):
            make_folder("directory", Path(directory))
    if chosen.steers:
        _warn.of_unlabelled(task, sets.forget)
    aim = aim_of(task, params, sets, held_out, asked.get("target")) if chosen.steers else None
    if aim is not None and held_out is not None and "target" not in asked and directory is not None:
        # The data that the target is measured on, not the target, which other devices round differently.
        given["held_out"] = digest_of_examples(held_out)
    steps, seed, rounds = counts["steps"], int(counts["seed"]), None
    if steps is None:
        sizes = terms_of(sets.counts, 1, batches)[1]
        rounds = rounds_of(sets.counts, sizes, 0 if held_out is None else len(held_out), budget)
        steps, given["rounds"] = sum(rounds), list(rounds)
    steps = int(steps)
    terms, sizes = terms_of(sets.counts, steps, batches)
    terms = terms._replace(rounds=rounds)
    known = given.get("start") or retain_figures(task, params, sets.retain, sum(sizes))
    check_told("retain", task, params, sets.retain, *known.values())
    if aim is not None and known["retain_error"] < 0:
        given_error = "None, and a retain loss" if task.error is None else "a mean on the retain set"
        raise ValueError(
            f"task.error: got {given_error} of {known['retain_error']:.3g}, but {method} steers an error "
            "that is never negative; expected such an error in the task, or EUPMU budget"
        )
    _warn.of_lost("retain", known)
    _warn.of_flat(method, chosen, task, known["retain_loss"])
    complete = asked
    if aim is not None:
        # The start of the distance to the target.
        known = known | {"forget_error": checked_start(task, params, sets.forget, held_out is not None)}
        aim = aim._replace(passes=aim.passes + passes_of_start(task, sets.forget))
        terms = terms._replace(at_least=aim.at_least)
        if not task.is_rate:
            _warn.of_reached(known["forget_error"], aim.target)
            _warn.of_unit(aim, asked)
        complete = steered(task, asked, aim.target, known["forget_error"])
        if not task.is_rate:
            _warn.of_wide(complete, asked, known["retain_error"])
    targets = None
    if chosen.transports and aim is not None:
        targets, passed = targets_of(task, params, sets.forget, sets.retain, held_out, aim.gone)
        aim = aim._replace(passes=aim.passes + passed)
    procedure = chosen.make(task, terms._replace(**known), complete)
    meta = {} if directory is None else identity(method, chosen, asked, steps, seed, sizes, every, sets, given)
    of_data = task, params, whole, sets, held_out, aim, targets
    return Ready(chosen, complete, procedure, *of_data, terms, sizes, known, meta)
