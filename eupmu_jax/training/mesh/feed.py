"""Batches for a mesh, read through grain: a function of the step's number, and of nothing else.

The order of the examples is fixed by the seed, and step s takes the batch at position s of it. So the position in the
data is the number of the step: a run starts again anywhere at no cost, and the number of processes changes nothing.
Each process reads only the rows that its own devices hold.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from eupmu_jax.sharding import check_axes

# Endless for a run, but a number: grain zips only data sets of one length, and has none for those without an end.
_STEPS = 2**31


def batches(
    read: Callable[[np.ndarray], Any],
    ids: Sequence[np.ndarray],
    sizes: Sequence[int],
    mesh: Mesh,
    *,
    seed: int,
    threads: int = 1,
) -> Callable[[int], Iterator[tuple[Any, ...]]]:
    """Endless batches of K example sets, every pass over a set in a new order; a batch may span two passes.

    Args:
      read: `read(ids) -> tree` with leaves `(len(ids), ...)`, for the ids of any of the sets. It is called with the
        rows that this process needs and no others, in a thread that reads ahead.
      ids: The examples of every set, forget first, `(n_k,)` each.
      sizes: Examples in a batch of each set, over all processes; multiples of the mesh axis `data`.
      mesh: With an axis `data`, over the devices of any number of processes, in any order.
      seed: Of the orders of all sets; the same in all processes.
      threads: Threads that read ahead; 0 reads when a batch is asked for.

    Returns:
      `start(step)`: an iterator from that step on. It yields tuples of K batches, global arrays with examples along
      `data` (the layout of `sharding.batch_shardings`).

    Raises:
      ValueError: For an empty set, another number of sets than of sizes, a size that `data` does not divide; later,
        for a leaf that `read` gave another number of rows than it was asked for.

    >>> mesh = jax.make_mesh((1,), ("data",))
    >>> start = batches(lambda ids: {"x": ids * 10}, [np.arange(3), np.arange(3, 9)], [3, 2], mesh, seed=0)
    >>> forget, retain = next(start(1_000_000))
    >>> sorted(forget["x"].tolist()), retain["x"].shape
    ([0, 10, 20], (2,))
    """
    data = _checked(ids, sizes, mesh)
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    parts = [_held(sharding, size, size // data) for size in sizes]
    local = grain.experimental.ZipMapDataset(
        [
            _rows(examples, size // data, part, data, np.random.SeedSequence((seed, k)).generate_state(1)[0]).map(read)
            for k, (examples, size, part) in enumerate(zip(ids, sizes, parts, strict=True))
        ]
    )

    def assemble(tree, size, part):
        def leaf_of(leaf):
            if leaf.shape[:1] != (rows := len(part) * size // data,):
                raise ValueError(f"read: got a leaf of shape {leaf.shape} for {rows} ids, expected a row for each")

            def block(index):
                first = part.index(index[0].indices(size)[0] * data // size) * (size // data)
                return leaf[first : first + size // data]

            return jax.make_array_from_callback((size, *leaf.shape[1:]), sharding, block)

        return jax.tree.map(leaf_of, tree)

    def start(step: int) -> Iterator[tuple[Any, ...]]:
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
        for trees in local[step:].to_iter_dataset(options):
            yield tuple(assemble(*of_set) for of_set in zip(trees, sizes, parts, strict=True))

    return start


def layout(read: Callable[[np.ndarray], Any], ids: Sequence[np.ndarray], sizes: Sequence[int], mesh: Mesh) -> tuple:
    """Shapes, dtypes and shardings of one step's `batches`; reads one example of each set. Arguments as there.

    >>> mesh = jax.make_mesh((1,), ("data",))
    >>> forget, retain = layout(lambda ids: np.zeros((len(ids), 28, 28)), [np.arange(9), np.arange(9)], [2, 6], mesh)
    >>> forget.shape, retain.shape
    ((2, 28, 28), (6, 28, 28))
    """
    _checked(ids, sizes, mesh)
    place = NamedSharding(mesh, PartitionSpec("data"))

    def of_set(examples, size):
        struct = lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape[1:]), leaf.dtype, sharding=place)
        return jax.tree.map(struct, read(np.asarray(examples[:1])))

    return tuple(of_set(examples, size) for examples, size in zip(ids, sizes, strict=True))


def _checked(ids, sizes, mesh):
    """Into how many parts examples are shared out."""
    check_axes(mesh)
    data = mesh.shape["data"]
    if len(ids) != len(sizes):
        raise ValueError(f"sizes: got {len(sizes)} for {len(ids)} sets of ids, expected one for each")
    for k, (examples, size) in enumerate(zip(ids, sizes, strict=True)):
        if len(examples) == 0:
            raise ValueError(f"ids: set {k} is empty, expected at least one example")
        if size < 1 or size % data:
            raise ValueError(f"sizes: got {size} for set {k}, expected a multiple of the mesh axis data, {data}")
    return data


def _held(sharding, size, block):
    """Which blocks of rows this process's devices hold; on a TPU slice they need not lie side by side."""
    places = sharding.addressable_devices_indices_map((size,)).values()
    return sorted({index[0].indices(size)[0] // block for index in places})


def _rows(examples, block, part, data, seed):
    """Position s: the ids of step s in the blocks `part` of `data`, one after the other."""
    passes = _STEPS * block * data // len(examples) + 1
    order = grain.MapDataset.source(np.asarray(examples)).seed(int(seed)).shuffle().repeat(passes).batch(block)
    # Block b of step s is number s * data + b: each process draws the ids of its own rows alone.
    return grain.experimental.ZipMapDataset([order[b : _STEPS * data : data] for b in part]).map(np.concatenate)
