"""Checks and prepares the inputs of `unlearn`: parameters, and two sets of examples."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from eupmu_jax._stack.algebra import is_finite
from eupmu_jax._stack.checks import describe
from eupmu_jax._stack.frozen import mask_of
from eupmu_jax._stack.programs import jit_for_task
from eupmu_jax.sharding import batch_shardings, check_axes
from eupmu_jax.tasks import Examples, Task, as_examples, check_task
from eupmu_jax.tasks.examples import rows_of, spread
from eupmu_jax.training._digest import numbers_of

# For a set that is not in memory, the number of examples, spread over it, that stand for all.
HASHED = 64
# Number of examples that a task checks at a time.
CHECKED = 10_000
# The largest seed for which JAX can make the keys of a run, which use the next seeds too.
MOST_SEED = 2**63 - 3
# Steps are counted in int32.
MOST_STEPS = 2**31 - 1


class Sets:
    """The forget and the retain set, and the batches of a step.

    Trees of arrays are kept on the device, where steps gather their batches. Everything else, and anything on a mesh,
    is read on the host for each step.
    """

    def __init__(self, forget, retain, mesh):
        self.mesh = mesh
        self.in_memory = mesh is None and isinstance(forget, Examples) and isinstance(retain, Examples)
        self._drawn: tuple = (None, None)
        if self.in_memory:
            on_device = lambda tree: jax.tree.map(jnp.asarray, tree)
            shared = forget.tree is retain.tree
            forget = Examples(on_device(forget.tree), forget.ids)
            retain = Examples(forget.tree if shared else on_device(retain.tree), retain.ids)
        elif mesh is not None:
            in_trees = isinstance(forget, Examples) and isinstance(retain, Examples)
            shared = in_trees and forget.tree is retain.tree
            forget = on_host(forget, narrow=in_trees)
            retain = Examples(forget.tree, retain.ids) if shared else on_host(retain, narrow=in_trees)
        self.forget, self.retain = forget, retain
        self.counts = len(forget), len(retain)

    def feed(self, task: Task, key: chex.PRNGKey, epoch: int, positions):
        """The data that the jitted step takes: arrays and the ids of both batches, or the batches themselves."""
        if self.in_memory:
            ids = tuple(part.ids[at] for part, at in zip((self.forget, self.retain), positions, strict=True))
            return self.drawn(task, key, epoch), ids
        batches = self.batches(positions)
        return batches if self.mesh is None else jax.device_put(batches, batch_shardings(batches, self.mesh))

    def alongside(self, values):
        """Values of the examples of a batch, laid out as the batch is."""
        return values if self.mesh is None else jax.device_put(values, batch_shardings(values, self.mesh))

    def batches(self, positions):
        """A batch of each set, as its source gives it."""
        return tuple(part[at] for part, at in zip((self.forget, self.retain), positions, strict=True))

    def drawn(self, task: Task, key: chex.PRNGKey, epoch: int):
        """Both trees with what the task draws for this pass over the forget set."""
        if self._drawn[0] != epoch:
            trees = self.forget.tree, self.retain.tree
            if task.draw is not None:
                first = _draw(task, key, epoch, trees[0])
                shared = trees[0] is trees[1]
                trees = first, first if shared else _draw(task, jax.random.fold_in(key, 2**31 - 1), epoch, trees[1])
            self._drawn = epoch, trees
        return self._drawn[1]

    def batch(self, k: int, positions, task: Task, key: chex.PRNGKey):
        """A batch of set k with what the task drew last, for use outside a step."""
        if self.in_memory:
            ids = (self.forget, self.retain)[k].ids[positions]
            return rows_of(self.drawn(task, key, self._drawn[0] or 0)[k], ids)
        batch = (self.forget, self.retain)[k][positions]
        return batch if task.draw is None else task.draw(key, 0, batch)


@jit_for_task()
def _draw(task, key, epoch, tree):
    return task.draw(key, epoch, tree)


def in_memory(name: str, examples: Any) -> Examples:
    """Arrays as `Examples`; raises `ValueError` for a source that gives batches, which no compiled loop can read.

    >>> len(in_memory("train", {"inputs": np.zeros((3, 2))}))
    3
    """
    if isinstance(examples, Examples):
        return examples
    found = as_examples(name, examples)
    if not isinstance(found, Examples):
        raise ValueError(f"{name}: got {type(examples).__name__}, expected a tree of arrays, or Examples of one")
    return found


def on_host(examples, narrow: bool = False):
    """Examples on the host, since restored arrays may be committed to one device, which a mesh does not take.

    With `narrow` their dtypes are JAX's, as on one device, so that the run has the same identity there.
    """
    if not isinstance(examples, Examples):
        return examples

    def moved(leaf):
        if isinstance(leaf, jax.Array) and leaf.is_fully_addressable and numbers_of(leaf) is leaf:
            leaf = np.asarray(leaf)
        if not narrow or not isinstance(leaf, np.ndarray):
            return leaf
        return leaf.astype(jax.dtypes.canonicalize_dtype(leaf.dtype), copy=False)

    return Examples(jax.tree.map(moved, examples.tree), examples.ids)


def check_arguments(
    task: Task, params, sets: Sets, held_out, frozen=None, losses: Sequence[str] = (), **counts: int
) -> None:
    """Raises `ValueError` for arguments with which no run can begin; `losses` names the forget losses that it uses."""
    check_counts(**counts)
    check_params(params, frozen)
    wanted = _described("forget", sets.forget)
    for name, part in (("retain", sets.retain), ("held_out", held_out)):
        if part is not None and (found := _described(name, part)) != wanted:
            raise ValueError(f"{name}: got examples {found}, expected them as in the forget set, {wanted}")
    for name, part in (("forget", sets.forget), ("retain", sets.retain), ("held_out", held_out)):
        if part is not None:
            check_examples(name, part, task, params)
    _check_functions(task, params, sets.forget, tuple(losses))


def check_counts(**counts: int) -> None:
    """Raises `ValueError` unless all are ints that a run can use: at least 1, except `probes` and `seed`."""
    for name, value in counts.items():
        least = 0 if name in ("probes", "seed") else 1
        if not isinstance(value, int | np.integer) or value < least:
            raise ValueError(f"{name}: got {value!r}, expected an int of at least {least}")
    for name, most in (("seed", MOST_SEED), ("steps", MOST_STEPS)):
        if counts.get(name, 0) > most:
            raise ValueError(f"{name}: got {counts[name]}, expected an int of at most {most}")


def check_params(params, frozen=None) -> None:
    """Raises `ValueError` unless all leaves that are not frozen are finite floating point arrays."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not leaves:
        raise ValueError("params: got a tree without leaves, expected the parameters of the original model")
    for (path, leaf), is_frozen in zip(leaves, jax.tree.leaves(mask_of(params, frozen)), strict=True):
        if is_frozen and not hasattr(leaf, "dtype") and not isinstance(leaf, bool | int | float | complex):
            raise ValueError(f"params: leaf {describe(path)} is {leaf!r}, expected numbers")
        if not is_frozen and not jnp.issubdtype(getattr(leaf, "dtype", None) or np.asarray(leaf).dtype, jnp.floating):
            raise ValueError(
                f"params: leaf {describe(path)} is {getattr(leaf, 'dtype', type(leaf).__name__)}, expected "
                "floating point arrays alone; freeze counters and keys (`frozen=`), and split functions off"
            )
        if isinstance(leaf, jax.Array) and leaf.is_deleted():
            raise ValueError(
                f"params: leaf {describe(path)} was donated to a compiled step or deleted, expected arrays that still "
                "have values: those that the step returned, or a copy made before it"
            )
        if not is_frozen and not is_finite(leaf):
            raise ValueError(
                f"params: leaf {describe(path)} has numbers that are not finite, expected those of a trained model"
            )


def _check_functions(task, params, forget, losses):
    shape_of = lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), jnp.result_type(leaf))
    given = [jax.tree.flatten(jax.tree.map(shape_of, tree)) for tree in (params, forget[np.zeros(2, int)])]
    _check_returned(task, losses, *((tuple(leaves), structure) for leaves, structure in given))


@functools.lru_cache(maxsize=64)
def _check_returned(task, losses, params, batch):
    """Raises `ValueError` unless a task's functions return what a run expects; traced once for these shapes."""
    params, batch = (jax.tree.unflatten(structure, leaves) for leaves, structure in (params, batch))
    try:
        outputs = jax.eval_shape(lambda p, b: task.outputs(p, b, None), params, batch)
    except Exception as error:
        # Of Flax, which this layer does not import.
        if type(error).__name__ != "TraceContextError":
            raise
        raise ValueError(
            "task.outputs: changes the variables of a Flax module, as BatchNorm and Dropout do in training mode; "
            "expected a model in evaluation mode: call its eval() before nnx.split"
        ) from error
    if task.num_classes is not None and getattr(outputs, "shape", (2, task.num_classes)) != (2, task.num_classes):
        raise ValueError(
            f"task.outputs: returned shape {outputs.shape} for 2 examples, expected (2, {task.num_classes}): a logit "
            "for each class"
        )
    drawn = batch if task.draw is None else jax.eval_shape(task.draw, jax.random.key(0), 0, batch)
    for name, tree in (("outputs", outputs), ("draw", drawn)):
        if any(leaf.shape[:1] != (2,) for leaf in jax.tree.leaves(tree)):
            found = _described_shape(tree)
            raise ValueError(f"task.{name}: returned {found} for 2 examples, expected them along the first axis")
    named = {f"forget[{name!r}]": (task.forget[name], drawn) for name in losses}
    for name, (loss, examples) in {"retain": (task.retain, batch), **named}.items():
        found = jax.eval_shape(loss, outputs, examples)
        if getattr(found, "shape", None) != ():
            shape = _described_shape(found)
            raise ValueError(f"task.{name}: returned {shape}, expected a scalar, the mean over a batch")
        if not jnp.issubdtype(found.dtype, jnp.floating):
            raise ValueError(f"task.{name}: returned {found.dtype}, expected a floating point number, with a gradient")
    if task.error is not None:
        errors = jax.eval_shape(task.error, outputs, batch)
        if getattr(errors, "shape", None) != (2,):
            raise ValueError(f"task.error: returned {_described_shape(errors)} for 2 examples, expected shape (2,)")


def _described_shape(tree):
    return f"shape {tree.shape}" if hasattr(tree, "shape") else str(jax.tree.map(lambda leaf: leaf.shape, tree))


def check_examples(name: str, examples: Any, task: Task, params: chex.ArrayTree) -> None:
    """Runs the task's own checks: on all examples if they are in memory, else on some spread over the set.

    Raises:
      ValueError: From the task, with the name of the set in front, and for arrays committed to other devices than
        the parameters.
    """
    check_task(task)
    # What another source holds says nothing about where its batches will be.
    held, given = (_devices_of(tree) for tree in (examples.tree if isinstance(examples, Examples) else (), params))
    if held and given and held != given:
        raise ValueError(
            f"{name}: got examples on {_devices(held)} and parameters on {_devices(given)}; expected the same devices, "
            "or examples as NumPy arrays, or `mesh` where it is an argument"
        )
    if task.check is task.check_model is None:
        return
    positions = spread(len(examples), len(examples) if isinstance(examples, Examples) else HASHED)
    for start in range(0, len(positions), CHECKED):
        try:
            batch = examples[positions[start : start + CHECKED]]
            if task.check is not None:
                task.check(batch)
            if task.check_model is not None:
                task.check_model(params, batch)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


def _devices_of(tree):
    """The devices that a tree's arrays are committed to, in lists; empty if JAX may still move all of them."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array) and leaf.is_fully_addressable]
    # Each platform counts its devices from 0, so an id alone could be that of a CPU or of a GPU.
    name = lambda device: (device.platform, device.id)
    return {tuple(sorted(map(name, leaf.devices()))) for leaf in leaves if leaf.committed}


def _devices(lists):
    named = lambda devices: ", ".join(f"{platform}:{number}" for platform, number in devices)
    return " and ".join(f"devices {named(devices)}" for devices in sorted(lists))


def _described(name, examples):
    """Shapes and dtypes of an example; for a set not in memory, raises `ValueError` if sampled examples differ."""
    at = lambda position: examples[np.array([position])]
    described = lambda tree: jax.tree.map(lambda leaf: (np.shape(leaf)[1:], str(jnp.result_type(leaf))), tree)
    first = described(at(0))
    for position in () if isinstance(examples, Examples) else spread(len(examples), 3):
        if (found := described(at(position))) != first:
            raise ValueError(
                f"{name}: got examples {first} and, at position {position}, {found}, expected one shape for all; pad "
                "them to the longest of the whole set"
            )
    return first


def check_start(start) -> dict[str, float]:
    """Known figures of the original model as floats; raises `ValueError` unless both are there and finite."""
    wanted = ("retain_loss", "retain_error")
    if not isinstance(start, Mapping) or set(start) != set(wanted) or not all(map(_is_finite, start.values())):
        raise ValueError(f"start: got {start!r}, expected finite numbers {' and '.join(wanted)}")
    return {name: float(start[name]) for name in wanted}


def _is_finite(value):
    array = np.asarray(value)
    return array.ndim == 0 and jnp.issubdtype(array.dtype, jnp.number) and bool(np.isfinite(array))


def check_storable(params) -> None:
    """Raises `ValueError` for empty leaves, which no checkpoint can hold."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not np.size(leaf):
            raise ValueError(
                f"params: leaf {describe(path)} has shape {np.shape(leaf)}, which no checkpoint can hold; "
                "expected at least one number in each leaf, or no directory"
            )


def batches_on(mesh, counts, batches) -> tuple[int, int]:
    """Sizes of both batches that a mesh can split: a set that is smaller than its batch is cut to fit.

    Raises:
      ValueError: For a batch that the mesh cannot split evenly, or a set with fewer examples than parts.
    """
    check_axes(mesh)
    shares, fitting = mesh.shape["data"], []
    for name, count, batch in zip(("forget", "retain"), counts, batches, strict=True):
        if batch % shares and batch <= count:
            raise ValueError(f"{name}_batch: got {batch}, expected a multiple of {shares}, the mesh's axis data")
        if count < shares:
            raise ValueError(f"{name}: got {count} examples, expected at least {shares}, one for each part of the mesh")
        fitting.append(min(batch, count) // shares * shares)
    return fitting[0], fitting[1]
