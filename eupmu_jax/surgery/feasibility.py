"""The best checkpoint that keeps the limit, if there is one, and the furthest point of a segment that keeps it."""

import warnings
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from eupmu_jax._stack import checks

# The same tree comes out as goes in, and type checkers should know it.
Params = TypeVar("Params")
# On digits, runs that were pulled back further than this had forgotten next to nothing of a random forget set.
LITTLE = 0.5


class BestFeasibleState(NamedTuple):
    """State of `best_feasible`.

    Attributes:
      params: The best checkpoint; that of `init` until a better one is found.
      forget_loss: Its forget loss.
      levels: Its `(K-1,)` retain levels.
      feasible: Whether it keeps every limit.
      progressed: Whether some checkpoint after `init` kept every limit and forgot more, or was the first to keep them.
      stalled: Checks since the best checkpoint changed.
      infeasible: True once `stalled` reaches `patience` and no checkpoint has progressed: within this limit nothing can
        be forgotten, at least by this optimizer. Stop, and return `params`.
    """

    params: chex.ArrayTree
    forget_loss: chex.Array
    levels: chex.Array
    feasible: chex.Array
    progressed: chex.Array
    stalled: chex.Array
    infeasible: chex.Array


class BestFeasible(NamedTuple):
    """A pair of pure functions; see `best_feasible`."""

    init: Callable[..., BestFeasibleState]
    update: Callable[..., BestFeasibleState]


def best_feasible(limit: chex.Numeric, patience: int = 10) -> BestFeasible:
    """Keeps the checkpoint with the lowest forget loss among those whose retain levels are within their limits.

    Measure the levels on the data that the limit applies to (the whole retain set, or a sample set aside for it) as
    often as you can afford; nothing is guaranteed between two checks. Until a checkpoint is within the limit, the one
    with the smallest violation is kept, so a start above its limit can be repaired. A checkpoint with a non-finite loss
    is never kept, except for the first one until a better one is found.

    Args:
      limit: Float, or one for each of the K-1 levels.
      patience: Number of consecutive checks without a change after which the state is `infeasible`.

    Returns:
      `init(params, forget_loss, levels) -> state` and `update(state, params, forget_loss, levels) -> state`, which may
      be jitted; `levels` is a float or `(K-1,)`.

    Raises:
      ValueError: For a limit that is NaN, a patience below 1, or another number of levels than of limits.

    >>> tracker = best_feasible(limit=0.1)
    >>> state = tracker.init(jnp.array(0.0), forget_loss=2.0, levels=0.05)
    >>> state = tracker.update(state, jnp.array(1.0), forget_loss=1.0, levels=0.09)
    >>> state = tracker.update(state, jnp.array(2.0), forget_loss=0.5, levels=0.11)
    >>> float(state.params), bool(state.progressed)
    (1.0, True)
    """
    count = checks.check_numbers("limit", limit)
    checks.check_int("patience", patience, 1)

    def violation(levels):
        return jnp.max(jnp.maximum(levels - jnp.asarray(limit), 0))

    def checked(levels, wanted):
        levels = jnp.atleast_1d(jnp.asarray(levels, float))
        if levels.ndim > 1 or levels.size != (wanted or levels.size):
            expected = f"({wanted},), as many as the limits or earlier levels" if wanted else "a number or (K-1,)"
            raise ValueError(f"levels: got shape {levels.shape}, expected {expected}")
        return levels

    def init_fn(params, forget_loss, levels):
        levels = checked(levels, count)
        return BestFeasibleState(
            params=jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), params),
            forget_loss=jnp.array(forget_loss, float, copy=True),
            levels=jnp.array(levels, copy=True),
            feasible=violation(levels) == 0,
            progressed=jnp.array(False),
            stalled=jnp.zeros([], jnp.int32),
            infeasible=jnp.array(False),
        )

    def update_fn(state, params, forget_loss, levels):
        forget_loss, levels = jnp.asarray(forget_loss, float), checked(levels, state.levels.size)
        excess, best_excess = violation(levels), violation(state.levels)
        better = jnp.where(excess == best_excess, forget_loss < state.forget_loss, excess < best_excess)
        is_finite = lambda loss, levels: jnp.isfinite(loss) & jnp.all(jnp.isfinite(levels))
        better |= ~is_finite(state.forget_loss, state.levels)
        better &= is_finite(forget_loss, levels)
        progressed = state.progressed | (better & (excess == 0))
        stalled = jnp.where(better, 0, optax.safe_increment(state.stalled))
        select = lambda new, old: jnp.where(better, new, old)
        return BestFeasibleState(
            params=jax.tree.map(select, params, state.params),
            forget_loss=select(forget_loss, state.forget_loss),
            levels=select(levels, state.levels),
            feasible=select(excess == 0, state.feasible),
            progressed=progressed,
            stalled=stalled,
            infeasible=~progressed & (stalled >= patience),
        )

    return BestFeasible(init_fn, update_fn)


class FurthestFeasible(NamedTuple, Generic[Params]):
    """Result of `furthest_feasible`.

    Attributes:
      params: The point on the segment.
      t: Where it lies: 0 is `inside`, 1 is `outside`.
      levels: The levels measured there; under `jax.jit` NaN for t = 0, which is not measured.
    """

    params: Params
    t: chex.Array
    levels: chex.Array


def furthest_feasible(
    measure: Callable[[Params], chex.Numeric],
    limit: chex.Numeric,
    inside: Params,
    outside: Params,
    bisections: int = 5,
) -> FurthestFeasible[Params]:
    r"""The point nearest to `outside` on the segment from `inside` that was measured to keep the limit.

    .. math::
      \theta = \theta_{in} + t (\theta_{out} - \theta_{in}), \qquad l_k(\theta) \le limit_k \;\forall k

    With forward passes alone, this pulls a run that ends a little above its limit back to it. It takes a run that ends
    below the limit further if `outside` is extrapolated beyond the run's end. Bisection finds t to within
    2^-bisections, or 1 if `outside` itself keeps the limit; if the levels cross the limit more than once on the
    segment, it finds one of the crossings. A level that is NaN keeps no limit.

    `measure` may be any function, including one that loops over batches and returns NumPy arrays. Under `jax.jit` it
    must be traceable, and no warning is given: check `t`.

    Args:
      measure: `measure(params)`: levels, a number or `(K-1,)`, on the data that the limit applies to. Called once if
        `outside` keeps the limit, else `bisections + 1` times (under `jit` always), and once more, on `inside`, if
        nothing else does.
      limit: Float, or one for each level.
      inside: Parameters that keep the limit, returned if no other point tried does.
      outside: Parameters of the same structure and shapes.
      bisections: At least 1.

    Returns:
      A `FurthestFeasible`: `params`, `t` and `levels`. Leaves that are random keys are not interpolated: for t < 1 they
      are those of `inside`.

    Raises:
      ValueError: For fewer than one bisection, a limit that is NaN, parameters that differ in structure or shapes, or
        levels of another shape than the limits.

    Warns:
      UserWarning: If t < 0.5: the limit undid much of the run. Raise it, or take steps that stay closer to it. A
        different warning if `inside` itself is above the limit.

    >>> found = furthest_feasible(lambda w: w**2, 2.25, jnp.array(0.0), jnp.array(2.0), bisections=8)
    >>> float(found.params), float(found.t), float(found.levels)
    (1.5, 0.75, 2.25)
    """
    checks.check_int("bisections", bisections, 1)
    checks.check_numbers("limit", limit)
    limit = np.asarray(limit) if isinstance(limit, list | tuple) else limit
    checks.check_same_shapes("outside", outside, "inside", inside)

    def between(t):
        def interpolate(a, b):
            # Random keys, counts and flags cannot be interpolated.
            dtype = jnp.result_type(a)
            return (a + t * (b - a)).astype(dtype) if jnp.issubdtype(dtype, jnp.inexact) else a

        return jax.tree.map(interpolate, inside, outside)

    def measured(params):
        levels = measure(params)
        levels = levels if isinstance(levels, jax.Array) else np.asarray(levels)
        if np.ndim(limit) and np.shape(limit) != levels.shape:
            raise ValueError(f"limit: got shape {np.shape(limit)}, but measure returned {levels.shape}")
        return levels

    end_levels = measured(outside)
    traced = checks.is_traced(limit, end_levels, *jax.tree.leaves((inside, outside)))
    search = _search_traced if traced else _search_on_host
    t, levels = search(lambda t: measured(between(t)), limit, end_levels, bisections)
    if not traced and t == 0:
        levels = measured(inside)
    if not traced and t == 0 and np.any(np.asarray(levels) > limit):
        warnings.warn(
            f"furthest_feasible: inside itself exceeds the limit, {levels} > {limit}, and is returned "
            "unchanged; pass parameters that keep the limit, or a higher limit",
            stacklevel=2,
        )
    elif not traced and t < LITTLE:
        warnings.warn(
            f"furthest_feasible: only {float(t):.3g} of the distance from inside to outside keeps the limit, so most "
            "of what the run did is lost; allow a higher limit, or take steps that stay closer to it",
            stacklevel=2,
        )
    # Interpolation would not reproduce the end points exactly, nor `inside` if `outside` is not finite.
    select = lambda begin, mid, end: jnp.where(t == 0, begin, jnp.where(t == 1, end, mid))
    return FurthestFeasible(jax.tree.map(select, inside, between(t), outside), t, levels)


def _search_traced(levels_at, limit, end_levels, bisections):
    """`(t, levels)` inside `jit`."""

    def halve(_, bounds):
        low, high, levels = bounds
        middle = (low + high) / 2
        middle_levels = levels_at(middle)
        keeps = jnp.all(middle_levels <= limit)
        levels = jnp.where(keeps, middle_levels.astype(levels.dtype), levels)
        return jnp.where(keeps, middle, low), jnp.where(keeps, high, middle), levels

    unknown = jnp.full(end_levels.shape, jnp.nan, jnp.promote_types(end_levels.dtype, jnp.float32))
    low, _, levels = jax.lax.fori_loop(0, bisections, halve, (jnp.float32(0), jnp.float32(1), unknown))
    keeps = jnp.all(end_levels <= limit)
    return jnp.where(keeps, 1.0, low), jnp.where(keeps, end_levels, levels)


def _search_on_host(levels_at, limit, end_levels, bisections):
    """`(t, levels)` outside `jit`, for any `measure`."""
    if np.all(end_levels <= limit):
        return jnp.float32(1), end_levels
    low, high, levels = jnp.float32(0), jnp.float32(1), np.full(end_levels.shape, np.nan)
    for _ in range(bisections):
        middle = (low + high) / 2
        middle_levels = levels_at(middle)
        if np.all(middle_levels <= limit):
            low, levels = middle, middle_levels
        else:
            high = middle
    return low, levels
