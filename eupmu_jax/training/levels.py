"""The error of a model on data that it never saw: the level to forget to, and whether a forget set has reached it."""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from eupmu_jax._stack.programs import fetched, jit_for_task
from eupmu_jax.tasks import Examples, Task, as_examples
from eupmu_jax.tasks.examples import part_of, spread
from eupmu_jax.tasks.task import of_each
from eupmu_jax.training._inputs import check_examples

# Examples measured at once, and the bytes their outputs may take: a language model needs a megabyte for a few tokens.
CHUNK, OUTPUT_BYTES = 500, 2**28
# Examples of a set that are measured where a sample is enough.
MOST = 2_000
CONFIDENCE = 0.95
# Resampled means from which the ends of an interval are read.
DRAWS = 2_000


class Level(NamedTuple):
    """The mean error of some examples.

    Attributes:
      error: The mean of `task.error`, or of the retain loss where the task has no error.
      low, high: Its 95 % interval.
      examples: Number of examples.
    """

    error: float
    low: float
    high: float
    examples: int


class Comparison(NamedTuple):
    """Whether forgotten and unseen examples can be told apart.

    Attributes:
      difference: Mean error of the forgotten examples minus that of the unseen ones.
      low, high: Its 95 % interval. If it contains 0, the two sets cannot be told apart by their errors.
      losses_p_value: p-value of the two-sample Kolmogorov-Smirnov test of the retain losses, or of `Task.nll` if there
        is one. A small value tells the sets apart.
    """

    difference: float
    low: float
    high: float
    losses_p_value: float


def unseen_level(task: Task, params: chex.ArrayTree, held_out: Any) -> Level:
    r"""The error of a model on examples that it never saw: the level that forgetting should reach and not exceed.

    .. math:: \hat e = \frac1n \sum_i e(\theta, x_i)

    A model trained without the forget set would treat it like any data it never saw. Such a model would have seen fewer
    examples in all, so its own level is a little higher; the smaller the forget set, the smaller the difference. For
    errors that are 0 or 1 the interval is Wilson's, which also holds for rates near 0; for others it is Student's t
    interval of the mean. With few errors that have a long tail it is too narrow: of 20 lognormal ones whose logarithms
    have a standard deviation of 2, the interval contains the mean in 63 % of cases, and lies below it in the others.

    Args:
      task: Its `error` is averaged, or its retain loss if `error` is None.
      params: Parameters of the original model.
      held_out: Examples as `unlearn` takes them.

    Returns:
      The level. To know a rate of 10 % to within 5 points takes 140 examples.

    Raises:
      ValueError: For an empty set, examples that the task refuses, an error that is not finite, or a loss that is NaN.

    >>> from eupmu_jax import tasks
    >>> task = tasks.classification(lambda params, inputs: inputs * params, num_classes=2)
    >>> held_out = {"inputs": jnp.eye(2)[jnp.zeros(100, int)], "labels": jnp.arange(100) % 10 // 9}
    >>> level = unseen_level(task, jnp.ones(2), held_out)
    >>> round(level.error, 3), round(level.low, 3), round(level.high, 3), level.examples
    (0.1, 0.055, 0.174, 100)
    """
    examples = as_examples("held_out", held_out)
    check_examples("held_out", examples, task, params)
    errors, losses = figures_of(task, params, examples)
    level = check_finite(level_of(errors))
    check_losses("held_out", losses)
    return level


def measured_level(task: Task, params: chex.ArrayTree, examples: Examples, most: int | None = None) -> Level:
    """As `unseen_level`, for any examples and without its checks, on at most `most` of them spread over the set."""
    errors, _ = figures_of(task, params, examples, most)
    return level_of(errors)


def unseen_levels(task: Task, params: chex.ArrayTree, held_out: Any, groups: Any) -> dict[Any, Level]:
    """`unseen_level` of each group of examples, such as the classes.

    Args:
      task, params, held_out: As in `unseen_level`.
      groups: `(n,)`: the group of each example.

    Raises:
      ValueError: As in `unseen_level`, and if `groups` does not have one entry for each example.

    >>> from eupmu_jax import tasks
    >>> task = tasks.classification(lambda params, inputs: inputs * params, num_classes=2)
    >>> held_out = {"inputs": jnp.eye(2)[jnp.zeros(4, int)], "labels": jnp.array([0, 0, 1, 1])}
    >>> {int(group): level.error for group, level in unseen_levels(task, 1.0, held_out, held_out["labels"]).items()}
    {0: 0.0, 1: 1.0}
    """
    examples, groups = as_examples("held_out", held_out), np.asarray(groups)
    if groups.shape != (len(examples),):
        raise ValueError(f"groups: got shape {groups.shape}, expected ({len(examples)},): one for each example")
    check_examples("held_out", examples, task, params)
    errors, losses = figures_of(task, params, examples)
    found = {group: check_finite(level_of(errors[groups == group])) for group in np.unique(groups)}
    check_losses("held_out", losses)
    return found


def compare(task: Task, params: chex.ArrayTree, forget: Any, held_out: Any, most: int = MOST) -> Comparison:
    r"""Compares a model on forgotten and on unseen examples, on at most `most` of each, spread over the sets.

    For errors that are 0 or 1 the interval is that of two independent rates. The spread of other errors may come mostly
    from noise that the task draws for each position in a batch, such as the times of a diffusion model. Each error is
    then compared with others at the same position: with n examples in one set and :math:`k n` or more in the other,

    .. math:: d_i = e_i - \frac1k \sum_{j=1}^k e'_{ij}, \qquad \bar d \pm t_{n-1}\, \mathrm{sd}(d) / \sqrt n

    The test of the losses does not remove that noise, so it has less power for such a task.

    Few errors with a long tail show too little of their spread. If k is at least 2, the interval is therefore at least
    so wide that it would contain 0 in 95 % of cases if both sets were like the larger one; errors drawn from that one
    at each position tell how wide that is. With few errors of 0 or 1 in a set the interval is too narrow: with 3, up to
    a quarter of such intervals exclude a true difference of 0, with 20 a tenth.

    Raises:
      ValueError: For an empty set, or examples that the task refuses.

    >>> from eupmu_jax import tasks
    >>> task = tasks.classification(lambda params, inputs: inputs * params, num_classes=2)
    >>> data = {"inputs": jnp.eye(2)[jnp.zeros(50, int)], "labels": jnp.arange(50) % 5 // 4}
    >>> found = compare(task, 1.0, data, data)
    >>> found.difference, found.low < 0 < found.high, float(found.losses_p_value)
    (0.0, True, 1.0)
    """
    from scipy import stats

    sets = {name: as_examples(name, data) for name, data in (("forget", forget), ("held_out", held_out))}
    for name, part in sets.items():
        check_examples(name, part, task, params)
    forgotten, unseen = (figures_of(task, params, part, most) for part in sets.values())
    if any(np.isnan(losses).any() for _, losses in (forgotten, unseen)):
        # The model has diverged, and its errors may look plausible.
        return Comparison(np.nan, np.nan, np.nan, np.nan)
    both = forgotten[0], unseen[0]
    if _is_rate(np.concatenate(both)):
        difference = float(np.mean(both[0]) - np.mean(both[1]))
        below = above = float(stats.norm.ppf((1 + CONFIDENCE) / 2) * np.hypot(*map(_deviation, both)))
    else:
        apart, (lowest, highest) = _differences_at_places(task, params, [*sets.values()], both)
        difference, width = float(np.mean(apart)), float(_quantile(len(apart)) * _deviation(apart))
        below, above = max(width, float(highest)), max(width, float(-lowest))
    losses = [found[1] for found in (forgotten, unseen)]
    if task.nll is not None:
        losses = [figures_of(task.attacked, params, part, most)[1] for part in sets.values()]
    p_value = stats.ks_2samp(*losses).pvalue
    return Comparison(difference, difference - below, difference + above, float(p_value))


def _differences_at_places(task, params, sets, errors):
    """Differences between each error of the smaller set and the mean error of the larger one at the same position.

    Also returns between which values their mean would lie in 95 % of cases if both sets were like the larger one, or
    zeros if there is one error at each position.
    """
    few = int(len(errors[0]) > len(errors[1]))
    count, groups = len(errors[few]), len(errors[1 - few]) // len(errors[few])
    positions = spread(len(sets[1 - few]), count * groups)
    others = [figures_of(task, params, part_of(sets[1 - few], positions[k::groups]))[0] for k in range(groups)]
    apart, ends = errors[few] - np.mean(others, axis=0), _ends_if_alike(np.stack(others))
    return (apart, ends) if few == 0 else (-apart, -ends[::-1])


def _ends_if_alike(others):
    """Ends of the middle 95 % of the mean of one error drawn at each position, less the mean of all.

    Args:
      others: `(k, n)`, k errors at each of n positions.
    """
    groups, count = others.shape
    if groups == 1:
        return np.zeros(2)
    drawn = others[np.random.default_rng(0).integers(groups, size=(DRAWS, count)), np.arange(count)]
    # What is drawn is part of the mean that it is compared with, which makes the difference smaller.
    larger = np.sqrt((groups + 1) / (groups - 1))
    return np.quantile(larger * (drawn.mean(axis=1) - others.mean()), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])


def _deviation(errors):
    """Standard error of the mean; never 0, as zero errors in n examples prove no zero rate (rule of succession)."""
    if _is_rate(errors):
        rate = (np.sum(errors) + 1) / (len(errors) + 2)
        return np.sqrt(rate * (1 - rate) / len(errors))
    return np.std(errors, ddof=1) / np.sqrt(len(errors)) if len(errors) > 1 else np.inf


def _quantile(count):
    """Quantile of Student's t for the mean of `count` errors."""
    from scipy import stats

    return float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) if count > 1 else np.inf


def _is_rate(errors):
    return bool(np.isin(errors, (0, 1)).all())


def level_of(errors: np.ndarray) -> Level:
    """The mean of the errors and its 95 % interval."""
    from scipy import stats

    mean, count = float(np.mean(errors)), len(errors)
    if _is_rate(errors):
        interval = stats.binomtest(int(errors.sum()), count).proportion_ci(CONFIDENCE, method="wilson")
        return Level(mean, float(interval.low), float(interval.high), count)
    width = float(_quantile(count) * _deviation(errors))
    return Level(mean, mean - width, mean + width, count)


def check_finite(level: Level) -> Level:
    """Returns the level; raises `ValueError` if its error is not finite."""
    if not np.isfinite(level.error):
        raise ValueError(f"held_out: got a mean error of {level.error}, expected finite errors of the original model")
    return level


def check_losses(name: str, losses: np.ndarray) -> None:
    """Raises `ValueError` if any loss is NaN, and names the set and the first such example."""
    if np.isnan(losses).any():
        raise ValueError(
            f"{name}: got {np.isnan(losses).sum()} of {len(losses)} examples whose loss under the original model is "
            f"NaN, the first at position {np.argmax(np.isnan(losses))}; expected none"
        )


def check_told(name: str, task: Task, params: chex.ArrayTree, examples, *figures: float) -> None:
    """Runs `check_losses` on a whole set if one of its figures is NaN."""
    if np.isnan(figures).any():
        check_losses(name, figures_of(task, params, examples)[1])


def figures_of(task: Task, params: chex.ArrayTree, examples, most: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The error and retain loss of each example, or of at most `most` spread over the set: `(n,)` each, float64."""
    chunk = chunk_of(task, params, examples)
    parts = [errors_and_losses(task, params, batch) for batch in batches_of(examples, most, chunk)]
    errors, losses = (np.concatenate([np.asarray(fetched(part[k]), np.float64) for part in parts]) for k in (0, 1))
    return errors, losses


def batches_of(examples, most: int | None = None, chunk: int = CHUNK) -> Iterator[chex.ArrayTree]:
    """Iterates over a set in batches of `chunk`, or over at most `most` examples spread over it."""
    positions = spread(len(examples), most or len(examples))
    for start in range(0, len(positions), chunk):
        yield examples[positions[start : start + chunk]]


def chunk_of(task: Task, params: chex.ArrayTree, examples) -> int:
    """How many examples to measure at once: 500, or as many as keep the outputs within 256 MB."""
    outputs = jax.eval_shape(functools.partial(_outputs, task), params, examples[np.zeros(1, int)])
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(outputs))
    return max(1, min(CHUNK, OUTPUT_BYTES // max(size, 1)))


@jit_for_task()
def _outputs(task, params, batch):
    return task.outputs(params, batch, None)


@jit_for_task()
def errors_and_losses(task: Task, params: chex.ArrayTree, batch: chex.ArrayTree) -> tuple[chex.Array, chex.Array]:
    """The error and the retain loss of each example of a batch."""
    outputs = task.outputs(params, batch, None)
    losses = of_each(task.retain, outputs, batch)
    errors = losses if task.error is None else jnp.asarray(task.error(outputs, batch))
    return errors.astype(jnp.float32), losses
