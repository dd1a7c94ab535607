"""The loop of every run: steps that can be stopped and resumed, on the same devices or on others.

A checkpoint holds the parameters, the optimizer and multiplier state, the key, and the step number, which is the
position in the data (`eupmu_jax.training.mesh.feed`) and is folded into the key. On the same mesh an interrupted run
equals an uninterrupted one bit for bit. On another mesh they agree up to rounding, since sums over devices are taken in
another order.
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
from eupmu_jax.training._faults import check_readable, check_storage, is_passing, located
from eupmu_jax.training._signals import stopping
from eupmu_jax.training.mesh.placement import Carry

# The key of the carry's digest in the saved history.
_DIGEST = "sha256"
_END = object()


class Progress(NamedTuple):
    """Where a run ended.

    Attributes:
      carry: The carry after the last step.
      step: Number of the step that would come next.
      preempted: Whether SIGTERM ended the run; the checkpoint of `step` is written, and the process should exit.
      reached: Whether `stop` ended the run.
    """

    carry: Carry
    step: int
    preempted: bool
    reached: bool = False


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
    stop: Callable[[int, Carry], bool] = lambda count, carry: False,
    log: Callable[[int, Any], None] = lambda count, metrics: None,
    log_every: int = 10,
) -> Progress:
    """Makes steps `first` to `first + steps - 1`, or those still missing from the checkpoint in `directory`.

    SIGTERM, which announces the end of a preemptible machine, ends the run after the current step, with a checkpoint.
    So does Ctrl-C; a second Ctrl-C ends it at once. Several processes agree on the step to stop at through JAX's
    preemption service, whichever of them received SIGTERM. A single process that is not part of `jax.distributed`
    handles the signals itself, so the call must be in its main thread. A process killed without warning loses only the
    steps since the last checkpoint.

    Args:
      advance: `advance(carry, count, batch) -> (carry, metrics)`, such as that of `placement.compile_step`. Steps are
        dispatched asynchronously; `log` and checkpoints wait for them.
      carry: The initial carry; donated, and replaced by that of the checkpoint if there is one.
      batches: `batches(step)` iterates over the batches from that step on; see `mesh.feed.batches`.
      steps: Number of steps in all.
      first: Number of the first step. A second run in the same processes must continue the numbering of the one before:
        processes agree on the number of the step to stop at, and could miss it if numbers started again.
      directory: Directory of the checkpoints, common to all processes: a path, or a URL such as gs://bucket/run, which
        needs gcsfs. None saves nothing, and leaves SIGTERM to the caller.
      meta: What identifies the run (data, seed, settings; not the mesh), as JSON. Saved, and compared on resuming.
      history: Lists that the callbacks append to. Saved with every checkpoint, and restored on resuming.
      save_every: Steps between checkpoints. The last step is always saved.
      on_step: Called after every step as `on_step(steps made, carry)`; it must not keep the carry.
      stop: Called after every step, and on resuming from a checkpoint, as `stop(steps made, carry)`; True ends the run
        there. It must give the same answer in every process and whenever it is called.
      log: Called in every process as `log(steps made, metrics)`, with the metrics as NumPy arrays.
      log_every: Steps between calls of `log`.

    Returns:
      Where the run ended. Returns at once if the checkpoint already holds the last step.

    Raises:
      ValueError: For counts below 1, for a checkpoint of a run with other `meta`, of other structure or shapes, or of
        more steps, for a folder that another process is using, or for batches that end too early.
      OSError: If a checkpoint cannot be written, as on a full disk. For the last checkpoint this is only a warning.
      KeyboardInterrupt: After Ctrl-C, once the checkpoint is written, unless the program handles Ctrl-C otherwise.

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
        check_storage("directory", directory)
    on_device = lambda leaf: jnp.asarray(leaf) if isinstance(leaf, np.ndarray | np.generic) else leaf
    carry, last, history = jax.tree.map(on_device, carry), first + steps, {} if history is None else history
    meta = _identity(carry, meta or {})
    with stopping(directory) as (received, stops), _checkpoints(directory) as manager:
        count, carry = (first, carry) if manager is None else _restore(manager, carry, meta, first, history)
        if count > last:
            raise ValueError(f"steps: got {steps} from step {first} on, but {directory} holds a run of {count} steps")
        stopped, stream = False, batches(count)
        reached = count > first and stop(count, carry)
        while count < last and not (stopped or reached):
            if (batch := next(stream, _END)) is _END:
                raise ValueError(f"batches: got none for step {count}, expected them up to step {last - 1}")
            carry, metrics = waited(advance(carry, np.int32(count), batch))
            count += 1
            stopped = stops(count)
            on_step(count, carry)
            reached = stop(count, carry)
            if count % log_every == 0 or count == last:
                log(count, jax.device_get(metrics))
            if manager is not None and (count % save_every == 0 or count == last or stopped or reached):
                with _written(directory, count, warns=count == last or reached):
                    _save(manager, count, carry, meta, history)
        if manager is not None:
            with _written(directory, count, warns=count == last or reached):
                manager.wait_until_finished()
    if signal.SIGINT in received:
        # Pass the signal on to the handler that was replaced.
        signal.raise_signal(signal.SIGINT)
    return Progress(carry, count, stopped or bool(received), reached)


def _save(manager, count, carry, meta, history):
    import orbax.checkpoint as ocp

    items = ocp.args.Composite(
        state=ocp.args.StandardSave(carry),
        meta=ocp.args.JsonSave(meta),
        # A copy, as it is written in the background while the next steps append to it.
        history=ocp.args.JsonSave(copy.deepcopy(history) | {_DIGEST: _digest(carry)}),
    )
    # Without force the manager would apply its own save interval.
    manager.save(count, args=items, force=True)


@contextlib.contextmanager
def _written(directory, count, warns):
    """Names the folder when a checkpoint cannot be written; after the last step this is only a warning."""
    try:
        yield
    except Exception as error:
        reason = str(error).partition("\n")[0]
        said = f"directory: the checkpoint of step {count} or earlier could not be written to {directory}: {reason}"
        if not warns:
            raise OSError(said) from error
        warnings.warn(said, stacklevel=4)


def _digest(carry):
    """Digest of a carry that this process can address in full; None on a mesh of several processes."""
    return digest(carry) if all(leaf.is_fully_addressable for leaf in jax.tree.leaves(carry)) else None


@contextlib.contextmanager
def _checkpoints(directory):
    """The checkpoint manager of a directory, locked against other processes."""
    if directory is None:
        yield None
        return
    # Imported lazily: only checkpoints need it.
    import orbax.checkpoint as ocp

    path = located(directory)
    # Removes what a killed run left half written before the next save, without a warning.
    options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True, cleanup_tmp_directories=True)
    with _lock(path):
        manager = ocp.CheckpointManager(path, options=options)
        try:
            yield manager
        finally:
            # Errors in writing have been reported by now.
            with contextlib.suppress(Exception):
                manager.close()


def _lock(path):
    """The lock of a local folder, held by the first of the processes that share a run."""
    if "://" in str(path) or jax.process_index() > 0:
        return contextlib.nullcontext()
    path.mkdir(parents=True, exist_ok=True)
    # A finished run can be read from a read-only folder.
    return alone(Path(path), "directory") if os.access(path, os.W_OK) else contextlib.nullcontext()


def _identity(carry, meta):
    """`meta` after a round trip through JSON, with the shape of every leaf, so that no leaf is restored as another."""
    leaves = jax.tree_util.tree_flatten_with_path(carry)[0]
    shapes = {f"carry{jax.tree_util.keystr(path)}": f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}
    return json.loads(json.dumps(meta)) | shapes


def _restore(manager, carry, meta, first, history):
    """The step to resume at and its carry, sharded like `carry`: from the latest checkpoint, or as given."""
    import orbax.checkpoint as ocp

    count = manager.latest_step()
    if count is None:
        return first, carry
    damaged = (
        f"directory: {manager.directory} holds no intact checkpoint of step {count} of a run like this, expected one "
        f"or an empty directory; if it is of such a run, but damaged, delete {manager.directory / str(count)} to resume"
    )
    json_items = ocp.args.Composite(meta=ocp.args.JsonRestore(), history=ocp.args.JsonRestore())
    with _readable(damaged):
        found = manager.restore(count, args=json_items)
        saved = found["meta"]
    # The caller's entries come first: leaf shapes may be many, and follow from them.
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
    # Freed first, or a device would have to hold two copies.
    jax.tree.map(lambda leaf: leaf.delete(), carry)
    with _readable(damaged):
        restored = manager.restore(count, args=ocp.args.Composite(state=ocp.args.StandardRestore(like)))["state"]
    # Gathered if need be, as a run of one process may resume on several.
    if expected is not None and digest(restored) != expected:
        raise ValueError(damaged)
    return count, restored


@contextlib.contextmanager
def _readable(damaged):
    """Replaces the error of an unreadable checkpoint by a message that says what to do about it."""
    try:
        yield
    except Exception as error:
        if is_passing(error):
            raise
        raise ValueError(damaged) from error
