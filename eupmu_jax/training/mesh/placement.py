"""What a run carries from step to step, its layout on a mesh, and the step compiled for that layout."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from eupmu_jax import sharding
from eupmu_jax._stack.programs import owner
from eupmu_jax.tasks import Task


class Carry(NamedTuple):
    """What one step passes to the next, and what a checkpoint holds; the key never changes."""

    params: chex.ArrayTree
    state: optax.OptState
    key: chex.PRNGKey


def layout(
    optimizer: optax.GradientTransformation,
    params: chex.ArrayTree,
    key: chex.PRNGKey,
    mesh: Mesh,
    *,
    axes: tuple[str, ...] = ("model",),
) -> Carry:
    """Shapes, dtypes and shardings of a run's carry, without arrays: enough to compile the step for any device.

    Args:
      optimizer: The optimizer whose state the step takes.
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
    """A run's initial carry in the layout of `layout`: copied parameters, and optimizer state created in place.

    Args:
      optimizer, mesh, axes: As in `layout`.
      params: The same in every process, or global arrays; not donated.
      key: Typed key, the same in every process; step s gets `jax.random.fold_in(key, s)`.

    >>> carry = place(optax.adam(0.1), {"w": np.ones(3)}, jax.random.key(0), sharding.make_mesh())
    >>> carry.params["w"].tolist(), carry.state[0].mu["w"].tolist()
    ([1.0, 1.0, 1.0], [0.0, 0.0, 0.0])
    """
    places = jax.tree.map(lambda leaf: leaf.sharding, layout(optimizer, params, key, mesh, axes=axes))
    # The steps donate their arguments, so they must not share the caller's buffers, as device_put alone would.
    copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=places.params)
    params = copy(jax.device_put(params, places.params))
    state = jax.jit(optimizer.init, out_shardings=places.state)(params)
    return Carry(params, state, _key_on(key, places.key))


def _key_on(key, place):
    """A typed key on a mesh; device_put cannot move one to the devices of other processes."""
    wrap = functools.partial(jax.random.wrap_key_data, impl=jax.random.key_impl(key))
    return jax.jit(wrap, out_shardings=place)(np.asarray(jax.random.key_data(key)))


def compile_step(step: Callable, carry: Carry, batches: Any) -> jax.stages.Compiled:
    """Compiles `step` for the shardings of its arguments; the carry is donated, and returned with the same shardings.

    Args:
      step: `step(params, state, batches, key) -> (params, state, metrics)`, that of `explicit_step` or `implicit_step`
        for a loss that takes a key. Metrics should be small, as they are replicated.
      carry: From `place` or `layout`.
      batches: The batches of one step, or their shapes and shardings from `feed.layout`.

    Returns:
      `advance(carry, count, batches) -> (carry, metrics)`; its `memory_analysis()` gives the bytes on each device.
    """
    places = jax.tree.map(lambda leaf: leaf.sharding, carry)

    def advance(carry, count, batches):
        params, state, metrics = step(carry.params, carry.state, batches, jax.random.fold_in(carry.key, count))
        return Carry(params, state, carry.key), metrics

    jitted = jax.jit(advance, donate_argnums=0, out_shardings=(places, places.key))
    return jitted.lower(carry, np.int32(0), batches).compile()


def model_axes(mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes that split parameters: `model`, if the mesh has it."""
    return ("model",) if "model" in mesh.shape else ()


def params_on(mesh: Mesh, params: chex.ArrayTree) -> chex.ArrayTree:
    """Shardings of parameters on a mesh: their own if they are already on it, else by `sharding.param_shardings`.

    So a custom layout is kept, for example over more axes than `model`, or from `nnx.get_named_sharding`.

    Args:
      mesh: From `sharding.make_mesh`.
      params: Arrays or `jax.ShapeDtypeStruct`s.

    >>> mesh, own = sharding.make_mesh(), PartitionSpec("data")
    >>> mine = jax.device_put(np.ones((512, 128), np.float32), NamedSharding(mesh, own))
    >>> [tuple(place.spec) for place in params_on(mesh, [mine, np.ones((512, 128), np.float32)])]
    [('data',), ('model', None)]
    """

    def kept(leaf, place):
        found = getattr(leaf, "sharding", None)
        return found if isinstance(found, NamedSharding) and found.mesh == mesh else place

    return jax.tree.map(kept, params, sharding.param_shardings(params, mesh, axes=model_axes(mesh)))


def places_of(params: chex.ArrayTree, state: chex.ArrayTree, mesh: Mesh) -> tuple[chex.ArrayTree, chex.ArrayTree]:
    """The shardings that `laid_out` gives the parameters and the state of a method on a mesh.

    Parameters are placed by `params_on`. A leaf of the state is sharded like the parameter whose path is a suffix of
    its own path, if it has the shape of that parameter or that shape after an objective axis. Everything else is
    replicated.

    Args:
      params, state: Arrays or `jax.ShapeDtypeStruct`s.
      mesh: From `sharding.make_mesh`.

    >>> params = {"w": jax.ShapeDtypeStruct((512, 128), np.float32)}
    >>> mine, moments = places_of(params, {"mu": params, "count": np.int32(0)}, sharding.make_mesh())
    >>> moments["mu"] == mine, tuple(moments["count"].spec)
    (True, ())
    """
    places = params_on(mesh, params)
    replicated = NamedSharding(mesh, PartitionSpec())
    paths = jax.tree_util.tree_leaves_with_path(params)
    known = [(path, leaf.shape, place) for (path, leaf), place in zip(paths, jax.tree.leaves(places), strict=True)]

    def of_state(path, leaf):
        for suffix, shape, place in known:
            if tuple(path[len(path) - len(suffix) :]) == tuple(suffix):
                if leaf.shape == shape:
                    return place
                if leaf.shape[1:] == shape:
                    return sharding.stacked_shardings(place)
        return replicated

    return places, jax.tree_util.tree_map_with_path(of_state, state)


def sharing(task: Task, mesh: Mesh) -> Task:
    """The task with compiled passes that split their examples along `data`, wherever the batch lies, evenly or not.

    Batches of a step are already laid out this way; those that a run is measured on may have any size.

    Args:
      task: Any task.
      mesh: A mesh with an axis `data`. If its axes are explicit, the task is returned unchanged.
    """
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        return task
    place = NamedSharding(mesh, PartitionSpec("data"))

    def share(leaf):
        if not isinstance(leaf, jax.core.Tracer):
            return leaf
        # Arguments can only be split evenly, so the batch is padded first; the slice need not be even.
        missing = -len(leaf) % mesh.shape["data"]
        whole = jnp.pad(leaf, [(0, missing), *[(0, 0)] * (leaf.ndim - 1)]) if missing else leaf
        return jax.lax.with_sharding_constraint(whole, place)[: len(leaf)]

    shared = lambda batch: jax.tree.map(share, batch)

    outputs, unknown = task.outputs, task.unknown
    return task._replace(
        # `owner` drops what is compiled for the run along with it.
        outputs=owner(lambda params, batch, key: outputs(params, shared(batch), key)),
        unknown=None if unknown is None else lambda params, batch: unknown(params, shared(batch)),
    )


def laid_out(carry: Carry, step: Callable, mesh: Mesh) -> tuple[Carry, Callable]:
    """A carry from one device, laid out on a mesh by `places_of`, and a step that keeps this layout.

    Args:
      carry: The carry on one device.
      step: `step(params, state, *rest) -> (params, state)`, jitted; it is traced again for the mesh.
      mesh: From `sharding.make_mesh`.
    """
    layout = places_of(carry.params, carry.state, mesh)
    params, state = jax.device_put((carry.params, carry.state), layout)
    key = _key_on(carry.key, NamedSharding(mesh, PartitionSpec()))
    return Carry(params, state, key), jax.jit(step, donate_argnums=(0, 1), out_shardings=layout)
