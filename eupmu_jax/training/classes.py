"""Classes of examples: which are to be forgotten, and unseen examples that mix the others as a forget set does."""

import bisect
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from eupmu_jax._stack.programs import fetched
from eupmu_jax.tasks import Examples, Task
from eupmu_jax.tasks.examples import part_of, spread
from eupmu_jax.training.levels import batches_of

# Fewest unseen examples from which a class is judged, and the fraction of a mix that may be missing.
FEW, LACKING = 5, 0.05


def alike(task: Task, some: Any, unseen: Any, gone: Collection = ()) -> tuple[Any, Any] | None:
    """Given examples, and a subset of unseen ones with the same mix of classes; both in full if there are no labels.

    A model has a higher error on unseen data of a hard class than on that of an easy one, so a forget set of another
    mix could be told apart from unseen data although the model keeps no trace of it. The subset is the largest with the
    mix of `some`, up to a missing fraction of one twentieth. If that is of a class much harder than the rest, it alone
    can tell sets of a thousand examples apart.

    Args:
      task: Determines whether there are classes.
      some, unseen: Examples.
      gone: Classes to be forgotten, which are left out on both sides. So are classes with fewer than 5 unseen examples,
        unless this holds for every class of the unseen data.

    Returns:
      Both sets, or None if no class or no unseen example is left.

    >>> from eupmu_jax import tasks
    >>> from eupmu_jax.tasks import as_examples
    >>> task = tasks.classification(lambda params, inputs: inputs, num_classes=3)
    >>> of = lambda *labels: as_examples("data", {"labels": np.array(labels)})
    >>> some, unseen = alike(task, of(0, 0, 0, 1, 2), of(*[0, 1] * 6, 2))
    >>> some.ids.tolist(), unseen.ids.tolist()
    ([0, 1, 2, 3], [0, 2, 4, 6, 8, 10, 1, 7])
    """
    left, right = labels_of(task, some), labels_of(task, unseen)
    if left is None or right is None:
        return some, unseen
    places = {c: np.flatnonzero(right == c) for c in np.unique(left).tolist() if c not in gone}
    if not places:
        return None
    if max(np.unique(right, return_counts=True)[1], default=0) < FEW:
        # There are too many classes to match the mix, so the classes are ignored.
        stay = lambda part, labels: part_of(part, np.flatnonzero(~np.isin(labels, list(gone))))
        found = stay(some, left), stay(unseen, right)
        return found if len(found[1]) else None
    places = {c: found for c, found in places.items() if len(found) >= FEW}
    if not places:
        return None
    counts = np.array([np.sum(left == c) for c in places])
    shares, most = counts / counts.sum(), np.array([len(found) for found in places.values()])
    lacking = lambda n: np.sum(np.maximum(shares - most / n, 0)) > LACKING
    size = bisect.bisect_left(range(1, most.sum() + 1), True, key=lacking)
    # Cumulative rounding: rounding one by one would drop rare classes or take too many of them.
    wanted = np.diff(np.floor(np.cumsum(shares) * max(size, 1) + 0.5).astype(int), prepend=0)
    taken = [found[spread(len(found), n)] for found, n in zip(places.values(), wanted, strict=True) if n]
    kept = np.isin(left, list(places))
    return part_of(some, np.flatnonzero(kept)), part_of(unseen, np.concatenate(taken))


def labels_of(task: Task, examples: Any) -> np.ndarray | None:
    """The labels `(n,)` of examples for a classifier or a task with conditions, else None; reads a source in full."""
    parts = [] if task.num_classes is None and task.unknown is None else list(_labels(examples))
    return np.concatenate(parts) if parts else None


def classes_to_go(task: Task, some: Any, retain: Any) -> frozenset[int]:
    """The classes of some examples that the retain set lacks, so that the model need not know them at all.

    A source of retain examples is read only until all classes have been found.

    >>> from eupmu_jax import tasks
    >>> task = tasks.classification(lambda params, inputs: inputs, num_classes=3)
    >>> of = lambda labels: tasks.as_examples("examples", {"labels": np.array(labels)})
    >>> classes_to_go(task, of([2, 2, 1]), of([0, 1]))
    frozenset({2})
    """
    labels = labels_of(task, some)
    if labels is None or not are_labelled(task, retain):
        return frozenset()
    lacking = frozenset(labels.tolist())
    for found in _labels(retain):
        lacking -= frozenset(found.tolist())
        if not lacking:
            break
    return lacking


def are_labelled(task: Task, examples: Any) -> bool:
    """Whether `labels_of` would find labels."""
    return not (task.num_classes is None and task.unknown is None) and any(True for _ in _labels(examples))


def _labels(examples):
    """Yields the labels in chunks; nothing if there are none."""
    if isinstance(examples, Examples):
        labels = examples.tree.get("labels") if isinstance(examples.tree, Mapping) else None
        if labels is not None and np.ndim(labels) == 1:
            yield fetched(labels)[examples.ids]
        return
    for batch in batches_of(examples):
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if labels is None or np.ndim(labels) != 1:
            return
        yield fetched(labels)
