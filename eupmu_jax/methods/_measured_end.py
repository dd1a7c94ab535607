"""The end of a run to a level: the measured point of its path that keeps the limit and is nearest to the target."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from eupmu_jax._stack.programs import fetched, jit_for_task
from eupmu_jax.tasks import Task
from eupmu_jax.tasks.examples import spread
from eupmu_jax.tasks.task import of_each

# How many examples of each set the end is chosen on, how many retained ones check it, and where points lie between the
# original and the last parameters. A twelfth of a small set would say next to nothing, and the whole of a large one
# would cost more than the steps. No bisection: halfway, a model may be worse than at either end.
MEASURED, LEAST, SHARE = 1_000, 100, 12
CHECKED = 500
WAYS = (0.9, 0.7, 0.4, 0.0)
PASSES = 2 + len(WAYS)


def samples_of(num_forget: int, num_retain: int) -> tuple[list[int], int]:
    """How many examples of each set a point is measured on, and how many more retained ones check it."""
    sizes = num_forget, num_retain
    counts = [size if size < 2 * LEAST else min(MEASURED, max(LEAST, -(-size // SHARE))) for size in sizes]
    return counts, max(min(CHECKED, num_retain) - counts[1], 0)


def passes_of_end(num_forget: int, num_retain: int, points: int = PASSES) -> int:
    """How many examples `measured_end` passes through the model to measure that many points."""
    counts, more = samples_of(num_forget, num_retain)
    return sum(counts) * points + 2 * more


def mean_error(task: Task, outputs: chex.ArrayTree, batch: chex.ArrayTree) -> chex.Array:
    """The mean of the task's error on a batch, or its retain loss if it has no error."""
    return task.retain(outputs, batch) if task.error is None else jnp.mean(task.error(outputs, batch))


class Target(NamedTuple):
    """Target of the error on the forget set.

    Attributes:
      error: The target.
      begun: The original model's error on the set; None if the target is the same for any sample.
      at_least: Whether a higher error is as good.
    """

    error: chex.Numeric
    begun: chex.Numeric | None = None
    at_least: bool = False

    def of_sample(self, original: np.ndarray) -> chex.Numeric:
        """The target on a sample where the original model has this error: higher by as much as the sample is harder."""
        if self.begun is None:
            return self.error
        harder = np.asarray(original - self.begun)
        return self.error + np.where(np.isfinite(harder), harder, np.zeros_like(harder))


# On the host, as each operation on these few numbers would be one more program to compile and to start.
@np.errstate(all="ignore")
def measured_end(
    task: Task,
    sets: tuple[Any, Any],
    chunk: int,
    target: Target,
    allowed: chex.Array,
    original: chex.ArrayTree,
    last: chex.ArrayTree,
    averaged: chex.ArrayTree | None = None,
) -> tuple[chex.ArrayTree, float]:
    """`(params, share)` of the point of the path that keeps the limit and is nearest to the target.

    Points are the last parameters, the averaged and the original ones, and some between the last and the original. They
    are measured on a sample of both sets, and the limit on more of the retain set. If no point keeps it, the one with
    the least retain error is returned.

    Points are built one at a time, and one program measures all of them: for a large model, all at once would not fit
    in memory, and each would be compiled separately.

    Args:
      task: Task of the model, with or without classes.
      sets: The forget and the retain set.
      chunk: Examples that are measured at once.
      target: Target of the error on the forget set.
      allowed: `(2,)`, by how much the error and the loss on the retain set may rise; infinity for any rise.
      original, last: Parameters.
      averaged: Parameters averaged over the end of the run; None if there are none.
    """
    counts, more = samples_of(*map(len, sets))
    measure = lambda part, positions: functools.partial(_mean_figures, task, part, positions, chunk)
    sampled = [spread(len(part), count) for part, count in zip(sets, counts, strict=True)]
    samples = [measure(part, positions) for part, positions in zip(sets, sampled, strict=True)]
    others = np.setdiff1d(np.arange(len(sets[1])), sampled[1])
    on_more = measure(sets[1], others[spread(len(others), more)]) if more else None
    back = [functools.partial(_between, original, last, way) for way in WAYS[:-1]]
    ends: list[Callable[[], chex.ArrayTree]] = [lambda: last] if averaged is None else [lambda: last, lambda: averaged]
    points: list[Callable[[], chex.ArrayTree]] = [*ends, *back, lambda: original]
    ways, allowed = np.array([1.0] * len(ends) + [*WAYS], np.float32), np.asarray(allowed)
    found = [[of_sample(point()) for of_sample in samples] for point in points]
    forget, retain = (np.stack([of_point[side] for of_point in found]) for side in range(2))
    error = np.asarray(target.of_sample(forget[-1, 0]), forget.dtype)
    distance = np.abs(forget[:, 0] - error)
    if target.at_least:
        # A distance that is not finite stays so.
        distance = np.where(forget[:, 0] > error, 0.0 * distance, distance)
    # Points that this sample cannot distinguish from the target are as good as it, and the first of them is taken.
    distance = np.where(distance <= _noise(task, error, counts[0], forget), 0.0, distance)
    rises, finite = retain[:, :2] - retain[-1:, :2], np.isfinite(distance)
    nearest = lambda kept: int(np.argmin(np.where(kept, distance, np.inf)))
    kept = np.all(rises <= allowed[None], axis=1) & finite
    if on_more is not None:
        # A limit may be finer than one example of the sample; more examples then decide whether it is kept.
        some = np.array([0.0 if task.num_classes is None else 1 / counts[1], 0.0], np.float32)
        kept = np.all(rises <= (allowed + some)[None], axis=1) & finite
        if kept.any():
            share = more / (more + counts[1])
            kept &= _keep(points, ways, rises, nearest(kept), on_more, share, allowed)
    least = np.where(np.isfinite(retain[:, 0]), retain[:, 0], np.inf)
    point = nearest(kept) if kept.any() else int(np.argmin(least))
    return points[point](), float(ways[point])


def _keep(points, ways, rises, point, on_more, share, allowed):
    """`(points,)`: which points keep the limit, given one of them measured on more of the retain set.

    The rise that the sample missed at that point is taken to grow with the distance from the original parameters for
    the others. `share` is the additional examples' share of all.
    """
    rise = on_more(points[point]())[:2] - on_more(points[-1]())[:2]
    missed = share * (rise - rises[point]) / np.maximum(ways[point], np.min(ways[:-1]))
    return np.all(rises + missed[None] * ways[:, None] <= allowed[None], axis=1)


def _noise(task, target, count, found):
    """`(points,)`: half of the 95 % interval of each mean error, and at least half an example if it is a rate.

    The interval of a rate is the wider of its own and the target's; for a class to be forgotten there is none.
    """
    if task.num_classes is None:
        # The spread grows with the error; its growth beyond the target must not excuse an error there.
        past = (found[:, 0] > target) & (not task.is_rate)
        share = np.where(past, target / np.where(past, found[:, 0], 1), 1.0)
        return 1.96 * share * np.sqrt(np.maximum(found[:, 2] - found[:, 0] ** 2, 0) / count)
    variance = np.maximum(target * (1 - target), found[:, 0] * (1 - found[:, 0]))
    return np.maximum(1.96 * np.sqrt(np.where(target < 1, variance, 0.0) / count), 0.5 / count)


def _mean_figures(task, part, positions, chunk, params):
    """`figures` on these examples of a set, in equal chunks; a remainder of fewer than one for each is left out."""
    chunks = -(-len(positions) // chunk)
    positions = positions[: len(positions) // chunks * chunks]
    found = [figures(task, params, part[positions[n::chunks]]) for n in range(chunks)]
    return sum(map(fetched, found)) / chunks


@jit_for_task()
def figures(task: Task, params: chex.ArrayTree, batch: chex.ArrayTree) -> chex.Array:
    """`(3,)`: the mean error, the retain loss, and the mean square of the error of an example."""
    outputs = task.outputs(params, batch, None)
    squares = jnp.mean(of_each(functools.partial(mean_error, task), outputs, batch) ** 2)
    return jnp.stack([mean_error(task, outputs, batch), task.retain(outputs, batch), squares])


@jax.jit
def _between(original, last, way):
    return jax.tree.map(lambda a, b: (a + way * (b - a)).astype(a.dtype), original, last)
