"""The loop of every run: steps that can be stopped and taken up again, on the same devices or on others.

What goes on from a checkpoint is parameters, optimizer and multiplier state, the key, and the number of the step, which
is the position in the data (`eupmu_jax.training.mesh.feed`) and is folded into the key. On the same mesh a run in parts
is equal to one in a piece bit by bit; on another it is so to rounding, since sums over devices are taken in another
order.
"""

import contextlib
import copy
import json
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eupmu_jax._stack.checks import check_int
from eupmu_jax._stack.programs import waited
from eupmu_jax.training._alone import alone
from eupmu_jax.training._digest import digest
from eupmu_jax.training._faults import check_readable, is_passing
from eupmu_jax.training._signals import stopping
from eupmu_jax.training.mesh.placement import Carry

# The place of the carry's digest in the saved history.
_DIGEST = "sha256"
_END = object()


class Progress(NamedTuple):
    """Where a run ended.

    Attributes:
      carry: After the last step.
      step: Number of the step that would come next.
      preempted: Whether SIGTERM ended it; the checkpoint of `step` is written, and the process should exit.
    """

    carry: Carry
    step: int
    preempted: bool


def run(
    advance: Callable,
    carry: Carry,
    batches: Callable[[int], Iterator],
    *,
    steps: int,
    first: int = 0,
    directory: str | os.PathLike[str] | None = None,
    meta: dict[str, Any] | None = None,
    history: dict[str, list] | None = None,
    save_every: int = 100,
    on_step: Callable[[int, Carry], None] = lambda count, carry: None,
    log: Callable[[int, Any], None] = lambda count, metrics: None,
    log_every: int = 10,
) -> Progress:
    """Makes steps `first` to `first + steps - 1`, or those that the checkpoint in `directory` has not made yet.

    SIGTERM, which announces the end of a preemptible machine, ends the run behind a step, with a checkpoint. So does
    Ctrl-C, of which the second ends it at once. Several processes agree on that step wherever SIGTERM came, through
    JAX's preemption service; a single process that is not part of `jax.distributed` handles the signals itself, so the
    call must be in its main thread. A process killed without warning loses the steps since the last checkpoint, and
    nothing else.

    Args:
      advance: `advance(carry, count, batch) -> (carry, metrics)`, such as that of `placement.compile_step`. Steps are
        dispatched ahead of their execution; `log` and checkpoints wait.
      carry: The start; donated, and dropped for that of the checkpoint if there is one.
      batches: `batches(step)` iterates over the batches from that step on; see `mesh.feed.batches`.
      steps: How many there are in all.
      first: Number of the first. A second run in the same processes goes on from the numbers of the one before: the
        step to stop at is agreed on by its number, and processes that count anew could miss it.
      directory: Of the checkpoints, common to all processes: a path, or a URL such as gs://bucket/run. None saves
        nothing, and leaves SIGTERM to the caller.
      meta: What makes the run what it is (data, seed, settings; not the mesh), as JSON. Saved, and compared.
      history: Lists that the callbacks add to. They are saved with every checkpoint, and put back on resuming.
      save_every: Steps between checkpoints. The last step is always saved.
      on_step: Called after every step as `on_step(steps made, carry)`; it must not keep the carry.
      log: Called in every process as `log(steps made, metrics)`, the metrics as numpy arrays.
      log_every: Steps between those calls.

    Returns:
      Where the run ended; at once, if its last step is in the checkpoint already.

    Raises:
      ValueError: For counts below 1; for a checkpoint of a run with other `meta`, of other structure or shapes, or of
        more steps; for a folder in which another process is at work; for batches that end too early.
      OSError: If a checkpoint cannot be written, as on a full disk. Of the last one that is a warning.
      KeyboardInterrupt: After Ctrl-C, once the checkpoint is written, or what else the program does about it.

    >>> carry = Carry(jnp.zeros(()), (), jax.random.key(0))
    >>> advance = lambda carry, count, batch: (carry._replace(params=carry.params + batch), ())
    >>> ended = run(advance, carry, lambda step: iter(range(step, 100)), steps=4)
    >>> float(ended.carry.params), ended.step
    (6.0, 4)
    """
    for name, value in {"steps": steps, "save_every": save_every, "log_every": log_every}.items():
        check_int(name, value, 1, static=True)
    if directory is not None:
        check_readable("directory", directory)
    on_device = lambda leaf: jnp.asarray(leaf) if isinstance(leaf, np.ndarray | np.generic) else leaf
    carry, last, history = jax.tree.map(on_device, carry), first + steps, {} if history is None else history
    meta = _identity(carry, meta or {})
    with stopping(directory) as (received, stops), _checkpoints(directory) as manager:
        count, carry = (first, carry) if manager is None else _restore(manager, carry, meta, first, history)
        if count > last:
            raise ValueError(f"steps: got {steps} from step {first} on, but {directory} holds a run of {count} steps")
        stopped, stream = False, batches(count)
        while count < last and not stopped:
            if (batch := next(stream, _END)) is _END:
                raise ValueError(f"batches: got none for step {count}, expected them up to step {last - 1}")
            carry, metrics = waited(advance(carry, np.int32(count), batch))
            count += 1
            stopped = stops(count)
            on_step(count, carry)
            if count % log_every == 0 or count == last:
                log(count, jax.device_get(metrics))
            if manager is not None and (count % save_every == 0 or count == last or stopped):
                with _written(directory, count, warns=count == last):
                    _save(manager, count, carry, meta, history)
        if manager is not None:
            with _written(directory, count, warns=count == last):
                manager.wait_until_finished()
    if signal.SIGINT in received:
        # Now for whoever handles it otherwise.
        signal.raise_signal(signal.SIGINT)
    return Progress(carry, count, stopped or bool(received))


def _save(manager, count, carry, meta, history):
    import orbax.checkpoint as ocp

    items = ocp.args.Composite(
        state=ocp.args.StandardSave(carry),
        meta=ocp.args.JsonSave(meta),
        # A copy: it is written while the next steps add to it.
        history=ocp.args.JsonSave(copy.deepcopy(history) | {_DIGEST: _digest(carry)}),
    )
    # By force, or the manager would go by an interval of its own.
    manager.save(count, args=items, force=True)


@contextlib.contextmanager
def _written(directory, count, warns):
    """Names the folder where a checkpoint cannot be written; of a run that has made its steps that is a warning."""
    try:
        yield
    except Exception as error:
        reason = str(error).partition("\n")[0]
        said = f"directory: the checkpoint of step {count} or before could not be written to {directory}: {reason}"
        if not warns:
            raise OSError(said) from error
        warnings.warn(said, stacklevel=4)


def _digest(carry):
    """Of what this process can see whole; None on a mesh of several processes."""
    return digest(carry) if all(leaf.is_fully_addressable for leaf in jax.tree.leaves(carry)) else None


@contextlib.contextmanager
def _checkpoints(directory):
    """What writes and reads them, while no other process does."""
    if directory is None:
        yield None
        return
    # Here alone: the package itself does not load what only checkpoints need.
    import orbax.checkpoint as ocp
    from etils import epath

    path = epath.Path(directory)
    # A URL counts as absolute; making it so again would turn it into a local path.
    path = path if path.is_absolute() else path.absolute()
    # What a killed run left half written goes before the next is written, without a warning.
    options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True, cleanup_tmp_directories=True)
    with _lock(path):
        manager = ocp.CheckpointManager(path, options=options)
        try:
            yield manager
        finally:
            # What went wrong in writing was said by then.
            with contextlib.suppress(Exception):
                manager.close()


def _lock(path):
    """Of a folder on this machine; of several processes that share a run, the first one's."""
    if "://" in str(path) or jax.process_index() > 0:
        return contextlib.nullcontext()
    path.mkdir(parents=True, exist_ok=True)
    # A finished run can be read where nothing can be written.
    return alone(Path(path), "directory") if os.access(path, os.W_OK) else contextlib.nullcontext()


def _identity(carry, meta):
    """`meta` as JSON would return it, and the shape of every leaf, so that nothing is read into the wrong place."""
    leaves = jax.tree_util.tree_flatten_with_path(carry)[0]
    shapes = {f"carry{jax.tree_util.keystr(path)}": f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}
    return json.loads(json.dumps(meta)) | shapes


def _restore(manager, carry, meta, first, history):
    """The step to go on with and its carry, in the places of `carry`: the latest checkpoint's, or as given."""
    import orbax.checkpoint as ocp

    count = manager.latest_step()
    if count is None:
        return first, carry
    damaged = (
        f"directory: {manager.directory} holds no whole checkpoint of step {count}, of a run like this; if it is one "
        "that was damaged, delete its folder to go on"
    )
    json_items = ocp.args.Composite(meta=ocp.args.JsonRestore(), history=ocp.args.JsonRestore())
    with _readable(damaged):
        found = manager.restore(count, args=json_items)
        saved = found["meta"]
    # The caller's entries first; shapes of leaves may be many, and follow from them.
    names = sorted(saved | meta, key=lambda name: (name.startswith("carry"), name))
    if differing := [name for name in names if saved.get(name) != meta.get(name)]:
        listed = ", ".join(f"{name} {meta.get(name)!r} (saved: {saved.get(name)!r})" for name in differing[:5])
        raise ValueError(
            f"directory: {manager.directory} holds another run; got {listed}; expected the saved values, or an empty "
            "directory"
        )
    expected = found["history"].pop(_DIGEST, None)
    history.update(found["history"])
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), carry)
    # Or a device would have to hold two of them.
    jax.tree.map(lambda leaf: leaf.delete(), carry)
    with _readable(damaged):
        restored = manager.restore(count, args=ocp.args.Composite(state=ocp.args.StandardRestore(like)))["state"]
    if expected is not None and _digest(restored) != expected:
        raise ValueError(damaged)
    return count, restored


@contextlib.contextmanager
def _readable(damaged):
    """Says of a checkpoint that cannot be read what to do about it."""
    try:
        yield
    except Exception as error:
        if is_passing(error):
            raise
        raise ValueError(damaged) from error
