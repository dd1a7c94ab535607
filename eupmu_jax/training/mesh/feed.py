"""Batches for a mesh, read through grain: a function of the step number alone.

The seed fixes the order of the examples, and step s takes the batch at position s of that order. The position in the
data is therefore the step number: a run can resume anywhere at no cost, and the number of processes changes nothing.
Each process reads only the rows that its own devices hold.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from eupmu_jax.sharding import check_axes

# More than any run needs, but finite: grain zips only data sets of equal length, and infinite ones have no length.
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
      read: `read(ids) -> tree` with leaves `(len(ids), ...)`, for the ids of any of the sets. It is called only with
        the rows that this process needs, in a thread that reads ahead.
      ids: The examples of every set, forget first, `(n_k,)` each.
      sizes: Examples in a batch of each set, over all processes; multiples of the size of the mesh axis `data`.
      mesh: A mesh with an axis `data`, over the devices of any number of processes, in any order.
      seed: Seed of the orders of all sets; the same in all processes.
      threads: Threads that read ahead; 0 reads each batch when it is requested.

    Returns:
      `start(step)`: an iterator from that step on. It yields tuples of K batches, global arrays with examples along
      `data` (the layout of `sharding.batch_shardings`).

    Raises:
      ValueError: For an empty set, numbers of sets and sizes that differ, or a size that is not a multiple of `data`;
        while iterating, for a leaf from `read` with a wrong number of rows.

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
    """Shapes, dtypes and shardings of one step's `batches`, with its arguments; reads one example of each set.

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
    """The number of parts into which examples are split; raises `ValueError` for wrong arguments."""
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
    """The blocks of rows that this process's devices hold; on a TPU slice they need not be adjacent."""
    places = sharding.addressable_devices_indices_map((size,)).values()
    return sorted({index[0].indices(size)[0] // block for index in places})


def _rows(examples, block, part, data, seed):
    """A data set whose element s holds the ids of step s in the blocks `part` of `data`, concatenated."""
    passes = _STEPS * block * data // len(examples) + 1
    order = grain.MapDataset.source(np.asarray(examples)).seed(int(seed)).shuffle().repeat(passes).batch(block)
    # Block b of step s has number s * data + b, so each process draws only the ids of its own rows.
    return grain.experimental.ZipMapDataset([order[b : _STEPS * data : data] for b in part]).map(np.concatenate)
