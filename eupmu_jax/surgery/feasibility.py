"""The best checkpoint that keeps the limit, whether there is one, and the last point of a segment that keeps it."""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax


class BestFeasibleState(NamedTuple):
    """State of `best_feasible`.

    Attributes:
      params: The best checkpoint; that of `init` until a better one comes.
      forget_loss: Its forget loss.
      levels: Its `(K-1,)` retain levels.
      feasible: Whether it keeps every limit.
      progressed: Whether some checkpoint after `init` kept every limit and forgot more.
      stalled: Checks since the best checkpoint changed.
      infeasible: True once `patience` checks have passed and none has progressed: with this limit nothing can be
        forgotten, by this optimizer at least. Stop, and return `params`.
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

    Measure the levels on the data that the limit is about (the whole retain set, or a sample kept for it), whenever
    that can be afforded; between two checks nothing is promised. Checkpoints above the limit are kept only while
    nothing else is known, the one with the smallest violation first; so a start above its limit can be repaired. A
    checkpoint with a loss that is not finite is never kept.

    Args:
      limit: Float, or one for each of the K-1 levels.
      patience: Number of checks without progress after which the state says `infeasible`.

    Returns:
      `init(params, forget_loss, levels) -> state` and `update(state, params, forget_loss, levels) -> state`, to be
      jitted or not; `levels` is a float or `(K-1,)`.

    Raises:
      ValueError: For a limit that is NaN, or a patience below 1.

    >>> tracker = best_feasible(limit=0.1)
    >>> state = tracker.init(jnp.array(0.0), forget_loss=2.0, levels=0.05)
    >>> state = tracker.update(state, jnp.array(1.0), forget_loss=1.0, levels=0.09)
    >>> state = tracker.update(state, jnp.array(2.0), forget_loss=0.5, levels=0.11)
    >>> float(state.params), bool(state.progressed)
    (1.0, True)
    """
    if not isinstance(limit, jax.core.Tracer) and np.any(np.isnan(limit)):
        raise ValueError(f"limit: got {limit}, expected numbers")
    if patience < 1:
        raise ValueError(f"patience: got {patience}, expected at least 1")

    def violation(levels):
        return jnp.max(jnp.maximum(levels - jnp.asarray(limit), 0))

    def init_fn(params, forget_loss, levels):
        levels = jnp.atleast_1d(jnp.asarray(levels, jnp.float32))
        return BestFeasibleState(
            params=jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), params),
            forget_loss=jnp.asarray(forget_loss, jnp.float32),
            levels=levels,
            feasible=violation(levels) == 0,
            progressed=jnp.array(False),
            stalled=jnp.zeros([], jnp.int32),
            infeasible=jnp.array(False),
        )

    def update_fn(state, params, forget_loss, levels):
        forget_loss = jnp.asarray(forget_loss, jnp.float32)
        levels = jnp.broadcast_to(jnp.asarray(levels, jnp.float32), state.levels.shape)
        excess, best_excess = violation(levels), violation(state.levels)
        better = jnp.where(excess == best_excess, forget_loss < state.forget_loss, excess < best_excess)
        better &= jnp.isfinite(forget_loss) & jnp.all(jnp.isfinite(levels))
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


def furthest_feasible(
    measure: Callable[[chex.ArrayTree], chex.Array],
    limit: chex.Numeric,
    inside: chex.ArrayTree,
    outside: chex.ArrayTree,
    bisections: int = 5,
) -> chex.ArrayTree:
    r"""The point nearest to `outside` on the segment from `inside` that was measured to keep the limit.

    .. math::
      \theta = \theta_{in} + t (\theta_{out} - \theta_{in}), \qquad l_k(\theta) \le limit_k \;\forall k

    A run that ends a little above its limit is so led back to it, and one that ends below can go on, by forward passes
    alone. Bisection finds t to 2^-bisections, and 1 if `outside` keeps the limit itself; where the levels cross the
    limit more than once on the segment, one of the crossings.

    Args:
      measure: `measure(params) -> (K-1,)` levels on the data that the limit is about; called `bisections + 1` times.
      limit: Float, or one for each level.
      inside: Parameters that keep the limit; not measured, and returned if no other point on the way does.
      outside: Parameters of the same structure.
      bisections: At least 1.

    Returns:
      Parameters; the function can be jitted if `measure` can.

    Raises:
      ValueError: For fewer than one bisection.

    >>> theta = furthest_feasible(lambda w: w**2, 0.25, jnp.array(0.0), jnp.array(2.0), bisections=8)
    >>> round(float(theta), 2)
    0.5
    """
    if bisections < 1:
        raise ValueError(f"bisections: got {bisections}, expected at least 1")

    def between(t):
        return jax.tree.map(lambda a, b: (a + t * (b - a)).astype(a.dtype), inside, outside)

    def keeps(params):
        return jnp.all(jnp.asarray(measure(params)) <= limit)

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        inside_middle = keeps(between(middle))
        return jnp.where(inside_middle, middle, low), jnp.where(inside_middle, high, middle)

    low, _ = jax.lax.fori_loop(0, bisections, halve, (jnp.float32(0), jnp.float32(1)))
    low = jnp.where(keeps(outside), 1.0, low)
    # Interpolation would not give the end points to the last bit, nor the first one if the other is not finite.
    select = lambda begin, mid, end: jnp.where(low == 0, begin, jnp.where(low == 1, end, mid))
    return jax.tree.map(select, inside, between(low), outside)
