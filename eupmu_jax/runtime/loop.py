"""A loop of steps on a mesh that can be stopped and taken up again, there or on another mesh.

What goes on from a checkpoint is parameters, optimizer and multiplier state, the key, and the number of the step, which
is the position in the data (`eupmu_jax.data.feed`) and is folded into the key. On the same mesh a run in parts is equal
to one in a piece bit by bit; on another it is so to rounding, since sums over devices are taken in another order.
"""

import contextlib
import functools
import json
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from eupmu_jax import sharding


class Carry(NamedTuple):
    """What one step hands to the next, and a checkpoint holds; the key stays as it is."""

    params: chex.ArrayTree
    state: optax.OptState
    key: chex.PRNGKey


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


def layout(
    optimizer: optax.GradientTransformation,
    params: chex.ArrayTree,
    key: chex.PRNGKey,
    mesh: Mesh,
    *,
    axes: tuple[str, ...] = ("model",),
) -> Carry:
    """Shapes, dtypes and shardings of a run's carry, without an array: enough to compile the step, for any device.

    Args:
      optimizer: Whose state the step takes.
      params: Arrays or `jax.ShapeDtypeStruct`s.
      key: A typed key.
      mesh, axes: As in `sharding.param_shardings`.

    Returns:
      A `Carry` of `jax.ShapeDtypeStruct`s.

    >>> carry = layout(optax.adam(0.1), {"w": np.ones(3)}, jax.random.key(0), sharding.make_mesh())
    >>> carry.state[0].mu["w"].shape, carry.state[0].mu["w"].sharding == carry.params["w"].sharding
    ((3,), True)
    """
    shapes = jax.eval_shape(lambda params, key: Carry(params, optimizer.init(params), key), params, key)
    shardings = sharding.param_shardings(params, mesh, axes=axes)
    state = sharding.state_shardings(optimizer, params, shardings)
    places = Carry(shardings, state, NamedSharding(mesh, PartitionSpec()))
    struct = lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
    return jax.tree.map(struct, shapes, places)


def place(
    optimizer: optax.GradientTransformation,
    params: chex.ArrayTree,
    key: chex.PRNGKey,
    mesh: Mesh,
    *,
    axes: tuple[str, ...] = ("model",),
) -> Carry:
    """A run's start, as `layout` has it: copies of the parameters, and the optimizer's state made where it will lie.

    Args:
      optimizer, mesh, axes: As in `layout`.
      params: The same in every process, or global arrays; the caller keeps them.
      key: Typed key, the same in every process; step s gets `jax.random.fold_in(key, s)`.
    """
    places = jax.tree.map(lambda leaf: leaf.sharding, layout(optimizer, params, key, mesh, axes=axes))
    # The steps donate what they are given, so nothing may be the caller's: device_put alone shares buffers.
    copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=places.params)
    params = copy(jax.device_put(params, places.params))
    state = jax.jit(optimizer.init, out_shardings=places.state)(params)
    # device_put takes no typed key to the devices of other processes.
    wrap = functools.partial(jax.random.wrap_key_data, impl=jax.random.key_impl(key))
    return Carry(params, state, jax.jit(wrap, out_shardings=places.key)(np.asarray(jax.random.key_data(key))))


def compile_step(step: Callable, carry: Carry, batches: Any) -> jax.stages.Compiled:
    """Compiles `step` for these places of its arguments, with the carry donated and its result in the same places.

    Args:
      step: `step(params, state, batches, key) -> (params, state, metrics)`, that of `explicit_step` or `implicit_step`
        for a loss that takes a key. Metrics are small: every device gets all of them.
      carry: From `place` or `layout`.
      batches: One step's, or their shapes and shardings from `data.feed.layout`.

    Returns:
      `advance(carry, count, batches) -> (carry, metrics)`; its `memory_analysis()` tells the bytes on each device.
    """
    places = jax.tree.map(lambda leaf: leaf.sharding, carry)

    def advance(carry, count, batches):
        params, state, metrics = step(carry.params, carry.state, batches, jax.random.fold_in(carry.key, count))
        return Carry(params, state, carry.key), metrics

    jitted = jax.jit(advance, donate_argnums=0, out_shardings=(places, places.key))
    return jitted.lower(carry, np.int32(0), batches).compile()


def run(
    advance: Callable,
    carry: Carry,
    batches: Callable[[int], Iterator],
    *,
    directory: str | os.PathLike[str],
    meta: dict[str, Any],
    steps: int,
    first: int = 0,
    save_every: int = 100,
    log: Callable[[int, Any], None] = lambda count, metrics: None,
    log_every: int = 10,
) -> Progress:
    """Makes steps `first` to `first + steps - 1`, or those that the checkpoint in `directory` has not made yet.

    SIGTERM, which announces the end of a preemptible machine, ends the run behind a step, with a checkpoint. Several
    processes agree on that step wherever the signal came, through JAX's preemption service; a single process that is
    not part of `jax.distributed` handles the signal itself, so the call must be in its main thread. A process killed
    without warning loses the steps since the last checkpoint, and nothing else.

    Args:
      advance: From `compile_step`. Steps are dispatched ahead of their execution; only `log` and checkpoints wait.
      carry: From `place`; donated, unless there is a checkpoint.
      batches: `batches(step)` iterates over the batches from that step on; see `data.feed.batches`.
      directory: Of the checkpoints, common to all processes: a path, or a URL such as gs://bucket/run.
      meta: What makes the run what it is (data, seed, settings; not the mesh), as JSON. Saved, and compared.
      steps: How many there are in all.
      first: Number of the first. A second run in the same processes goes on from the numbers of the one before: the
        step to stop at is agreed on by its number, and processes that count anew could miss it.
      save_every: Steps between checkpoints. The last step is always saved.
      log: Called in every process as `log(steps made, metrics)`, the metrics as numpy arrays.
      log_every: Steps between those calls.

    Returns:
      Where the run ended; at once, if its last step is in the checkpoint already.

    Raises:
      ValueError: For counts below 1; for a checkpoint of a run with other `meta`, or of other structure or shapes.
    """
    for name, value in {"steps": steps, "save_every": save_every, "log_every": log_every}.items():
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")
    last, meta = first + steps, _identity(carry, meta)
    with _preemption() as preempted, _checkpoints(directory) as manager:
        count, carry = _restore(manager, carry, meta, first)
        stopped = False
        stream = batches(count)
        while count < last and not stopped:
            carry, metrics = advance(carry, np.int32(count), next(stream))
            count += 1
            stopped = preempted(count)
            if count % log_every == 0 or count == last:
                log(count, jax.device_get(metrics))
            if count % save_every == 0 or count == last or stopped:
                items = ocp.args.Composite(state=ocp.args.StandardSave(carry), meta=ocp.args.JsonSave(meta))
                # Not asked whether it would: its answer counts steps from checkpoints of its own.
                manager.save(count, args=items, force=True)
        return Progress(carry, count, stopped)


def _checkpoints(directory):
    path = epath.Path(directory)
    # A URL counts as absolute; making it so again would turn it into a local path.
    path = path if path.is_absolute() else path.absolute()
    return ocp.CheckpointManager(path, options=ocp.CheckpointManagerOptions(max_to_keep=2, create=True))


def _identity(carry, meta):
    """`meta` as JSON would return it, and the shape of every leaf, so that nothing is read into the wrong place."""
    leaves = jax.tree_util.tree_flatten_with_path(carry)[0]
    shapes = {f"carry{jax.tree_util.keystr(path)}": f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}
    return json.loads(json.dumps(meta)) | shapes


def _restore(manager, carry, meta, first):
    """The step to go on with and its carry, in the places of `carry`: the latest checkpoint's, or as given."""
    count = manager.latest_step()
    if count is None:
        return first, carry
    saved = manager.restore(count, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
    if differing := [name for name in sorted(saved | meta) if saved.get(name) != meta.get(name)]:
        listed = ", ".join(f"{name} {meta.get(name)!r} (saved: {saved.get(name)!r})" for name in differing)
        raise ValueError(
            f"directory: {manager.directory} holds another run; got {listed}; expected the saved values, or an empty "
            "directory"
        )
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), carry)
    return count, manager.restore(count, args=ocp.args.Composite(state=ocp.args.StandardRestore(like)))["state"]


@contextlib.contextmanager
def _preemption():
    """A function of the number of steps made: whether to stop there, the same in all processes."""
    if jax.distributed.is_initialized():
        yield multihost_utils.reached_preemption_sync_point
        return
    received = []
    previous = signal.signal(signal.SIGTERM, lambda *_: received.append(True))
    try:
        yield lambda count: bool(received)
    finally:
        signal.signal(signal.SIGTERM, previous)
