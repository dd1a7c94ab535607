"""Runs without a fixed number of steps: rounds, each twice as long as the one before, with a test after each."""

import functools
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import chex
import numpy as np

from eupmu_jax._stack.checks import check_int
from eupmu_jax.methods.method import Method
from eupmu_jax.tasks import Task
from eupmu_jax.tasks.examples import part_of, spread
from eupmu_jax.training.classes import alike
from eupmu_jax.training.levels import MOST
from eupmu_jax.training.targets import scores_of

# Largest share of a round's passes that the test after it may cost; a step makes three passes of its examples.
SHARE = 0.05
# Passes over the forget set after which a run without a budget ends.
PASSES = 32
# Level of the test, and the share of a class to be forgotten that may still be recognised.
LEVEL, KNOWN = 0.05, 0.02


def rounds_of(counts: tuple[int, int], sizes: tuple[int, int], unseen: int, budget: int | None) -> tuple[int, ...]:
    """The steps of each round.

    The first has at least one pass over the forget set, and as many steps as keep the test after it below 5 % of its
    cost. Each other one has twice as many as the one before; the last also takes what is left of the budget. A budget
    too small for the first makes a single, shorter round.

    Args:
      counts, sizes: Examples of the forget and the retain set, and of their batches.
      unseen: Held-out examples.
      budget: Examples that the steps may pass in all, forward and backward; 32 passes over the forget set if None.

    Raises:
      ValueError: For a budget too small for one step.

    >>> rounds_of((400, 3600), (16, 48), 1000, None), rounds_of((400, 3600), (16, 48), 1000, 1000)
    ((146, 654), (15,))
    """
    most = PASSES * -(-counts[0] // sizes[0]) if budget is None else int(budget) // sum(sizes)
    if most < 1:
        raise ValueError(f"budget: got {budget} examples, expected at least {sum(sizes)}, which one step passes")
    tested = min(counts[0], MOST) + min(unseen, MOST)
    length = max(-(-counts[0] // sizes[0]), int(np.ceil(tested / (3 * SHARE * sum(sizes)))))
    rounds: list[int] = []
    while sum(rounds) + length <= most:
        rounds.append(length)
        length *= 2
    if not rounds:
        return (most,)
    rounds[-1] += most - sum(rounds)
    return tuple(rounds)


def ends_of(rounds: tuple[int, ...] | None) -> frozenset[int]:
    """The steps after which rounds end, none without rounds.

    >>> sorted(ends_of((10, 20)))
    [10, 30]
    """
    return frozenset(np.cumsum(rounds or (), dtype=int).tolist())


class TwoSampleTest(NamedTuple):
    """A test of whether forgotten and unseen examples can be told apart, and the number of examples that it passes."""

    differ: Callable[[chex.ArrayTree], bool]
    examples: int


# Of a run with a fixed number of steps.
NO_TEST = TwoSampleTest(lambda params: True, 0)


def check_open_ended(name: str, method: Method, steps: int | None, budget: int | None) -> None:
    """Raises `ValueError` for `steps=None` with a method that cannot run so, or a budget beside a number of steps."""
    if steps is None and not method.transports:
        raise ValueError(f"steps: got None, but {name} needs to know its steps; expected a number, or EUPMU transport")
    if budget is not None:
        check_int("budget", budget, 1, static=True)
        if steps is not None:
            raise ValueError(f"budget: got {budget} with {steps} steps, expected steps=None, or no budget")


def detectable(forgotten: int, unseen: int) -> float:
    r"""The distance between two distribution functions that the test finds with a probability of at least 80 %.

    .. math:: 1.36 \sqrt{1/n + 1/m} + \sqrt{\ln 20 / 2n} + \sqrt{\ln 20 / 2m}

    from the inequality of Dvoretzky, Kiefer and Wolfowitz with Massart's constant, applied to both samples. Two equal
    distributions are told apart in 5 % of tests.

    >>> round(detectable(2000, 2000), 3)
    0.098
    """
    n, m = float(forgotten), float(unseen)
    deviation = lambda count: np.sqrt(np.log(20) / (2 * count))
    return float(1.36 * np.sqrt(1 / n + 1 / m) + deviation(n) + deviation(m))


def told_apart(task: Task, forget: Any, held_out: Any, gone: Collection) -> TwoSampleTest:
    """The test of parameters for whether forgotten and unseen examples can be told apart.

    It is the two-sample test of Kolmogorov and Smirnov of the scores of at most 2,000 examples of each set, at a level
    of 5 %. The classes of the unseen ones are mixed as in the forget set. If all classes are to be forgotten entirely,
    it asks instead whether less than 98 % of the forgotten examples have negative scores, and so are more likely to be
    something else to the model. Scores that are not finite can be told apart.
    """
    both = None if held_out is None else alike(task, forget, held_out, gone)
    if both is None:
        sample = _sample(forget)
        return TwoSampleTest(functools.partial(_is_known, task, sample), len(sample))
    samples = [_sample(part) for part in both]
    return TwoSampleTest(functools.partial(_differ, task, samples), sum(map(len, samples)))


def _sample(part):
    return part_of(part, spread(len(part), MOST))


def _is_known(task, sample, params):
    # NaN counts as known.
    return not np.mean(scores_of(task, params, sample) < 0) >= 1 - KNOWN


def _differ(task, samples, params):
    from scipy import stats

    scores = [scores_of(task, params, part) for part in samples]
    return not all(np.isfinite(part).all() for part in scores) or bool(stats.ks_2samp(*scores).pvalue < LEVEL)
