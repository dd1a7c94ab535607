"""Shardings of everything a step touches: parameters, optimizer state, stacked gradients, multipliers and batches.

A step of this library is a pure function, so it runs on a mesh unchanged: place its arguments by these rules and call
it under `jax.jit`. The names of the mesh axes are `data` (examples), `model` (parameters, FSDP or tensor style) and
`objective` (the rows of the stack, if different devices are to hold different objectives).
"""

import math
from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from eupmu_jax._stack import algebra

# Below this many elements the latency of gathering a parameter outweighs the memory that sharding it saves.
MIN_SIZE = 2**14


def make_mesh(data: int = 1, model: int = 1, objective: int = 1, *, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of `objective x data x model` devices; XLA propagates shardings along its axes (`AxisType.Auto`).

    Args:
      data, model, objective: Devices along each axis.
      devices: The devices to choose from, of which JAX arranges the first ones; None is `jax.devices()`.

    Returns:
      The mesh, with axes `objective`, `data`, `model`.

    Raises:
      ValueError: For an axis below 1, or fewer devices than the mesh needs.

    >>> dict(make_mesh(data=1).shape)
    {'objective': 1, 'data': 1, 'model': 1}
    """
    shape = {"objective": objective, "data": data, "model": model}
    for axis, size in shape.items():
        if not isinstance(size, int | np.integer) or size < 1:
            raise ValueError(f"{axis}: got {size}, expected an int of at least 1 device")
    devices = jax.devices() if devices is None else devices
    if len(devices) < (count := math.prod(shape.values())):
        raise ValueError(f"devices: got {len(devices)}, expected at least {count} for a mesh of {shape}")
    # A tensor axis is often smaller than any physical axis, which then has to be split.
    places = mesh_utils.create_device_mesh(
        tuple(shape.values()), devices=devices[:count], allow_split_physical_axes=True
    )
    return Mesh(places, tuple(shape), axis_types=(AxisType.Auto,) * len(shape))


def param_shardings(params: chex.ArrayTree, mesh: Mesh, *, axes: Sequence[str] = ("model",)) -> chex.ArrayTree:
    """A sharding for every parameter: each of `axes` splits the largest dimension that it divides and no other splits.

    `("model",)` keeps a full copy on every slice along `data`; `("data", "model")` shards parameters, gradients and
    optimizer state over all devices (FSDP, ZeRO-3), and XLA gathers each layer where it is used. The axes are placed
    from the longest on and never share a dimension, so a vector is split along one of them only. Parameters with fewer
    than 16,384 elements are replicated, as are those that no axis divides. The rule suits any model; a layout that the
    model names itself (`flax.nnx.get_named_sharding`) does better.

    Args:
      params: Arrays or `jax.ShapeDtypeStruct`s.
      mesh: From `make_mesh`, or another whose axes are of type `Auto`; one with explicit axes needs `jax.set_mesh`.
      axes: Names of mesh axes.

    Returns:
      Tree of `NamedSharding`s.

    Raises:
      ValueError: For an axis that the mesh does not have, or one named twice.

    >>> sharding = param_shardings(jax.ShapeDtypeStruct((512, 128), jnp.float32), make_mesh())
    >>> tuple(sharding.spec)
    ('model', None)
    """
    if isinstance(axes, str) or len(set(axes)) < len(axes):
        raise ValueError(f"axes: got {axes!r}, expected a tuple of distinct names of mesh axes")
    for axis in axes:
        if axis not in mesh.shape:
            raise ValueError(f"axes: got {axis!r}, expected names of mesh axes: {', '.join(mesh.shape)}")

    def shard(param):
        shape = np.shape(param)
        spec: list = [None] * len(shape)
        if math.prod(shape) >= MIN_SIZE:
            for axis in sorted(axes, key=lambda axis: -mesh.shape[axis]):
                free = [i for i, size in enumerate(shape) if spec[i] is None and size % mesh.shape[axis] == 0]
                if free:
                    spec[max(free, key=lambda i: shape[i])] = axis
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(shard, params)


def stacked_shardings(shardings: chex.ArrayTree, *, objective: str | None = None) -> chex.ArrayTree:
    """Shardings of the stacked gradients of parameters that are laid out as `shardings`.

    Args:
      shardings: Tree of `NamedSharding`s, one for each parameter.
      objective: Mesh axis to split the rows along; with None every device holds its part of all rows.

    >>> sharding = param_shardings(jax.ShapeDtypeStruct((512, 128), jnp.float32), make_mesh())
    >>> tuple(stacked_shardings(sharding).spec)
    (None, 'model', None)
    >>> tuple(stacked_shardings(sharding, objective="objective").spec)
    ('objective', 'model', None)
    """
    return jax.tree.map(lambda s: NamedSharding(s.mesh, PartitionSpec(objective, *s.spec)), shardings)


def state_shardings(
    optimizer: optax.GradientTransformation, params: chex.ArrayTree, shardings: chex.ArrayTree
) -> chex.ArrayTree:
    """Shardings of `optimizer.init(params)`: moments and stacked sums follow their parameters, the rest is replicated.

    A leaf of the state that has its parameter's shape gets that parameter's sharding; one with a leading objective axis
    (the sums of `accumulate`) gets it after that axis; anything else (multipliers, Gram matrix, counters, factored
    moments) is replicated.

    Args:
      optimizer: Any optax transform, from this library or another.
      params: Arrays or `jax.ShapeDtypeStruct`s.
      shardings: Tree of `NamedSharding`s, one for each parameter.

    Returns:
      Tree of `NamedSharding`s with the state's structure, for `jax.device_put`, `out_shardings` and checkpoints.

    >>> params = jax.ShapeDtypeStruct((512, 128), jnp.float32)
    >>> found = state_shardings(optax.adam(0.1), params, param_shardings(params, make_mesh()))
    >>> tuple(found[0].mu.spec), tuple(found[0].count.spec)
    (('model', None), ())
    """
    if not jax.tree.leaves(shardings):
        raise ValueError("shardings: got a tree without leaves, expected one NamedSharding for each parameter")
    replicated = NamedSharding(jax.tree.leaves(shardings)[0].mesh, PartitionSpec())
    state = jax.eval_shape(optimizer.init, params)

    # Wrappers of optax and of this library leave these in place of the parameters that they do not touch.
    is_absent = lambda node: node is None or isinstance(node, optax.MaskedNode)

    def shard(leaf, param, sharding):
        if is_absent(leaf):
            return leaf
        if leaf.shape == np.shape(param):
            return sharding
        if leaf.shape[1:] == np.shape(param):
            return stacked_shardings(sharding)
        return replicated

    return optax.tree_utils.tree_map_params(
        optimizer, shard, state, params, shardings, transform_non_params=lambda _: replicated, is_leaf=is_absent
    )


def check_axes(mesh: Mesh, axes: Sequence[str] = ("data",)) -> None:
    """Raises `ValueError` unless `mesh` is a mesh with these axes."""
    if not hasattr(mesh, "shape"):
        raise ValueError(f"mesh: got {mesh!r}, expected a mesh, such as sharding.make_mesh returns")
    if missing := [axis for axis in axes if axis not in mesh.shape]:
        given = ", ".join(mesh.shape) or "none"
        raise ValueError(f"mesh: got axes {given}, expected {', '.join(missing)} among them, as in sharding.make_mesh")


def batch_shardings(batches: Any, mesh: Mesh, *, objective: bool = False) -> Any:
    """Shardings of batches: examples along `data`, everything else replicated.

    Args:
      batches: A tuple of K batches, their leaves `(n, ...)`; or, with `objective`, a stacked batch, `(K, n, ...)`.
      mesh: From `make_mesh`.
      objective: Whether to split a stacked batch's first axis along the mesh axis `objective`, so that different slices
        of devices pass different objectives through the model. This needs a mode of `"vmap"`, and a K that is a
        multiple of the axis size.

    Raises:
      ValueError: For a leaf without examples, a number of examples that the mesh cannot split evenly, or a mesh without
        the axis.

    >>> tuple(batch_shardings((jnp.zeros((8, 3)), jnp.zeros((72, 3))), make_mesh())[1].spec)
    ('data',)
    """
    axes = ("objective", "data") if objective else ("data",)
    check_axes(mesh, axes)

    def shard(path, leaf):
        shape = np.shape(leaf)
        if len(shape) < len(axes) or any(size % mesh.shape[axis] for size, axis in zip(shape, axes, strict=False)):
            places = " x ".join(f"{axis} {mesh.shape[axis]}" for axis in axes)
            raise ValueError(
                f"batches: leaf {jax.tree_util.keystr(path)} has shape {shape}, expected leading axes that are "
                f"multiples of {places}"
            )
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree_util.tree_map_with_path(shard, batches)


def gram_matrix(updates: chex.ArrayTree, shardings: chex.ArrayTree) -> chex.Array:
    r"""`algebra.gram_matrix` of rows that are sharded over a mesh, with one all-reduce of K(K+1)/2 numbers.

    Left alone, XLA all-reduces the inner products of each leaf separately. Here each device first sums over its own
    shards of all leaves, where a leaf that r devices replicate counts 1/r on each, and a single sum follows over the
    mesh axes along which any leaf is split. If none is, every device already has the whole sum and nothing is
    communicated.

    Args:
      updates: Stacked tree, `(K, *param.shape)` in every leaf, its objective axis not sharded.
      shardings: Tree of `NamedSharding`s on one mesh, one for each parameter.

    Returns:
      Symmetric `(K, K)` array, on every device.

    >>> leaf = jnp.array([[-1.0, 1.0], [1.0, 0.0]])
    >>> gram_matrix({"w": leaf}, {"w": param_shardings(leaf[0], make_mesh())}).tolist()
    [[2.0, -1.0], [-1.0, 1.0]]
    """
    if isinstance(shardings, NamedSharding) and not jax.tree_util.treedef_is_leaf(jax.tree.structure(updates)):
        raise ValueError("shardings: got one NamedSharding, expected a tree of them, one for each parameter")
    pairs: list = []
    # `freeze` leaves None in place of a frozen parameter.
    jax.tree.map(lambda *pair: pairs.append(pair), updates, shardings, is_leaf=lambda node: node is None)
    # A leaf without elements adds nothing, and cannot be split over devices.
    pairs = [pair for pair in pairs if pair[0] is not None and np.size(pair[0])]
    if not pairs:
        raise ValueError("updates: got a tree without elements, expected stacked gradients")
    rows, lies = zip(*pairs, strict=True)
    mesh, k = lies[0].mesh, rows[0].shape[0]
    upper = np.triu_indices(k)

    used = [{a for part in lie.spec if part for a in jax.tree.leaves(part) if mesh.shape[a] > 1} for lie in lies]
    shared_out = set().union(*used)

    def local_sum(rows):
        groups: dict[int, list] = {}
        for leaf, axes in zip(rows, used, strict=True):
            copies = math.prod(mesh.shape[axis] for axis in shared_out - axes)
            groups.setdefault(copies, []).append(leaf)
        partial = sum(algebra.gram_matrix(leaves) / copies for copies, leaves in groups.items())[upper]
        return jax.lax.psum(partial, tuple(shared_out)) if shared_out else partial

    specs = tuple(lie.spec for lie in stacked_shardings(lies))
    total = jax.shard_map(local_sum, mesh=mesh, in_specs=(specs,), out_specs=PartitionSpec(), check_vma=False)(rows)
    return jnp.zeros((k, k), total.dtype).at[upper].set(total).at[upper[::-1]].set(total)
