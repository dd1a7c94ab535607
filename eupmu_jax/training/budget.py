"""A run under a limit on the loss of the whole retain set: blocks of steps, full passes, and a final line search."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from eupmu_jax.surgery.feasibility import BestFeasibleState, best_feasible, furthest_feasible


class BudgetRun(NamedTuple):
    """The result of a run under a limit.

    Attributes:
      best: The checkpoint to deploy and its measurements; `infeasible` if nothing could be forgotten.
      last: Parameters after the last step, whatever their levels.
      history: Lists `step`, `forget_loss` and `levels`, with an entry for the start and for every block of steps.
      full_passes: How often the whole sets were measured; the line search measures the retain set alone.
    """

    best: BestFeasibleState
    last: chex.ArrayTree
    history: dict[str, list]
    full_passes: int


def run_within_limit(
    block: Callable,
    measure: Callable[[chex.ArrayTree], tuple[chex.Array, chex.Array]],
    limit: chex.Numeric,
    params: chex.ArrayTree,
    state: chex.ArrayTree,
    *,
    blocks: int,
    steps_per_block: int,
    patience: int = 5,
    bisections: int = 5,
) -> BudgetRun:
    """Alternates blocks of steps with measurements, and returns the best parameters measured to keep the limit.

    The steps aim at the limit on minibatches, and end somewhere near it. From there a line search with forward passes
    on the whole retain set (`furthest_feasible`) finds the limit itself. If the end lies above the limit, the search
    goes back towards the best checkpoint. If it lies below, the search continues in the direction of the whole run, by
    at most the same distance again. The loss of the result is therefore measured, and it is above the limit only if it
    was so at the start and no checkpoint brought it down.

    Args:
      block: `block(params, state, anchor, index) -> (params, state)` makes `steps_per_block` steps; `anchor` is
        `(params, levels)` at the last measurement, and block number `index` starts at 0.
      measure: `measure(params) -> (forget_loss, levels)` on whole sets. A `jax.tree_util.Partial` with the data as
        its arguments lets runs of equal shapes share compiled code.
      limit: Float, or one for each level.
      params, state: Initial values; not modified.
      blocks, steps_per_block: Size of the run.
      patience: Number of blocks without a checkpoint that forgets within the limit after which the run stops.
      bisections: As in `furthest_feasible`.

    Returns:
      The run. It stops early if the limit leaves no room for forgetting; `best.infeasible` is then True.

    >>> block = lambda w, state, anchor, index: (w + 0.3, state)
    >>> measure = lambda w: (-w, w**2)
    >>> found = run_within_limit(block, measure, 0.25, jnp.float32(0), (), blocks=2, steps_per_block=1, bisections=8)
    >>> round(float(found.best.params), 2), found.history["step"]
    (0.5, [0, 1, 2])
    """
    # Wrapping a Partial again would turn its data into constants, compiled anew in every run.
    measure = measure if isinstance(measure, Partial) else Partial(measure)
    forget_loss, levels = _measure(measure, params)
    best = best_feasible(limit, patience).init(params, forget_loss, levels)
    history: dict[str, list] = {
        "step": [0],
        "forget_loss": [float(forget_loss)],
        "levels": [np.asarray(levels).tolist()],
    }
    anchor, start = (params, levels), params
    for index in range(blocks):
        params, state = block(params, state, anchor, index)
        forget_loss, levels = _measure(measure, params)
        best = _update(limit, patience, best, params, forget_loss, levels)
        anchor = params, levels
        history["step"].append((index + 1) * steps_per_block)
        history["forget_loss"].append(float(forget_loss))
        history["levels"].append(np.asarray(levels).tolist())
        if best.infeasible:
            break
    full_passes = len(history["step"])
    if best.feasible:
        inside, outside = best.params, params
        if np.all(levels <= limit):
            inside, outside = params, jax.tree.map(_beyond, start, params)
        params = _search(Partial(_levels, measure), limit, inside, outside, bisections).params
        best = _update(limit, patience, best, params, *_measure(measure, params))
        full_passes += bisections + 2
    return BudgetRun(best, anchor[0], history, full_passes)


def _beyond(start, end):
    """The point as far beyond the end as the end is from the start; counters and keys stay at the end."""
    return (2 * end - start).astype(end.dtype) if jnp.issubdtype(end.dtype, jnp.inexact) else end


_search = jax.jit(furthest_feasible, static_argnums=4)


@jax.jit
def _measure(measure, params):
    return measure(params)


@functools.partial(jax.jit, static_argnames="patience")
def _update(limit, patience, best, params, forget_loss, levels):
    return best_feasible(limit, patience).update(best, params, forget_loss, levels)


def _levels(measure, params):
    return measure(params)[1]
