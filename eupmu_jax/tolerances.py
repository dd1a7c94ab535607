"""Tolerances: how fast each retain loss may rise, in units of the loss per unit of step size.

A tolerance epsilon always means an *allowed increase*: with theta <- theta - alpha * d, the surgery keeps
<g_r, d> >= -epsilon, so the retain loss rises by at most alpha * epsilon in a step, to first order.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax


class Tolerance(NamedTuple):
    """A rule for the tolerance of a step, with a state as an optax transform has one.

    Attributes:
      init: `(num_constraints, dtype) -> state`.
      update: `(count, levels, state) -> (epsilon, state)`, where `count` is the number of steps taken, `levels` the
        `(K-1,)` retain losses of this step or None, and epsilon a scalar or a `(K-1,)` array.
      num_constraints: K-1 if the rule fixes it, else None.
    """

    init: Callable[[int, Any], chex.ArrayTree]
    update: Callable[[chex.Numeric, chex.Array | None, chex.ArrayTree], tuple[chex.Numeric, chex.ArrayTree]]
    num_constraints: int | None = None


def constant(tolerance: chex.Numeric) -> Tolerance:
    """The same tolerance in every step: a float for all constraints or a `(K-1,)` array.

    Raises:
      ValueError: If `tolerance` is negative or NaN, or has more than one dimension.

    >>> float(constant(0.1).update(0, None, ())[0])
    0.1...
    """
    if np.ndim(tolerance) > 1:
        raise ValueError(f"tolerance: got shape {np.shape(tolerance)}, expected a float or one value per constraint")
    if not isinstance(tolerance, jax.core.Tracer) and not np.all(np.asarray(tolerance) >= 0):
        raise ValueError(
            f"tolerance: got {tolerance}, expected numbers >= 0: it is the increase of the retain loss that is allowed"
        )
    num_constraints = np.size(tolerance) if np.ndim(tolerance) else None
    return stateless(lambda count, levels: jnp.asarray(tolerance), num_constraints)


def schedule(schedule_fn: Callable[[chex.Numeric], chex.Numeric]) -> Tolerance:
    """A tolerance that follows an optax schedule of the step count.

    >>> float(schedule(lambda count: 0.5 * count).update(3, None, ())[0])
    1.5
    """
    return stateless(lambda count, levels: jnp.asarray(schedule_fn(count)))


def relative(share: chex.Numeric) -> Tolerance:
    """A share of the current retain losses: epsilon_k = share * l_k. Reads the losses.

    >>> relative(0.1).update(0, jnp.array([2.0, 4.0]), ())[0].round(3).tolist()
    [0.2..., 0.4...]
    """
    num_constraints = constant(share).num_constraints
    return stateless(lambda count, levels: jnp.asarray(share) * _given(levels, "relative"), num_constraints)


def budget(limit: chex.Numeric, rate: "chex.Numeric | optax.Schedule", *, relative_to_start: bool = False) -> Tolerance:
    r"""A barrier that keeps every retain loss under its limit: :math:`\epsilon_k = rate \cdot (limit - l_k)`.

    Along the flow the retain loss then obeys :math:`\dot l_k \le rate \cdot (limit - l_k)` and approaches its limit
    without crossing it, however long the run; a loss above the limit is brought down at the same rate (its epsilon is
    negative). The bound holds to first order and for the losses given: minibatch losses bound the minibatch loss,
    `levels` of the whole retain set bound that.

    The unit of `rate` is that of the tolerance it makes: in `unilateral_surgery` and `implicit_surgery` it is per unit
    of step size, and with step size alpha the bound needs `alpha * rate <= 1`; in `utility_guard` it is the share of
    the distance to the limit that one step may use up, at most 1.

    Args:
      limit: Loss that must not be exceeded, a float or `(K-1,)`.
      rate: Positive float, or a schedule of the step count.
      relative_to_start: If true, `limit` is how much each retain loss may rise above its value in the first step.

    Raises:
      ValueError: For a limit that is NaN or has more than one dimension, or a rate that is not positive.

    >>> tolerance = budget(limit=2.0, rate=10.0)
    >>> tolerance.update(0, jnp.array([1.5]), tolerance.init(1, jnp.float32))[0].tolist()
    [5.0]
    """
    if np.ndim(limit) > 1 or (not isinstance(limit, jax.core.Tracer) and np.any(np.isnan(limit))):
        raise ValueError(f"limit: got {limit}, expected a number or one for each constraint")
    num_constraints = np.size(limit) if np.ndim(limit) else None
    if not callable(rate) and not isinstance(rate, jax.core.Tracer) and not np.all(np.asarray(rate) > 0):
        raise ValueError(f"rate: got {rate}, expected a positive number or a schedule")

    def slack(count, levels, limits):
        return (rate(count) if callable(rate) else rate) * (limits - levels)

    if not relative_to_start:
        return stateless(
            lambda count, levels: slack(count, _given(levels, "budget"), jnp.asarray(limit)), num_constraints
        )

    def init_fn(num_constraints, dtype):
        # Infinity until the first loss is seen: the start is the first level that comes.
        return jnp.full(num_constraints, jnp.inf, dtype)

    def update_fn(count, levels, start):
        levels = _given(levels, "budget")
        start = jnp.where(jnp.isinf(start), levels, start).astype(start.dtype)
        return slack(count, levels, start + limit), start

    return Tolerance(init_fn, update_fn, num_constraints)


def stateless(
    evaluate: Callable[[chex.Numeric, chex.Array | None], chex.Numeric], num_constraints: int | None = None
) -> Tolerance:
    """A `Tolerance` from a function `(count, levels) -> epsilon`."""
    return Tolerance(lambda *_: (), lambda count, levels, state: (evaluate(count, levels), state), num_constraints)


def _given(levels, rule):
    if levels is None:
        raise ValueError(f"losses: got None, but the tolerance {rule!r} reads them; call update(..., losses=losses)")
    return levels


def as_tolerance(tolerance: "chex.Numeric | Callable | Tolerance") -> Tolerance:
    """A float, a `(K-1,)` array, a schedule `count -> tolerance` or a `Tolerance`, as a `Tolerance`."""
    if isinstance(tolerance, Tolerance):
        return tolerance
    return schedule(tolerance) if callable(tolerance) else constant(tolerance)


def evaluate(tolerance: Tolerance, count: chex.Array, levels: chex.Array | None, state, num_constraints: int, dtype):
    """The tolerance of this step as a `(K-1,)` array, and the rule's new state.

    Raises `ValueError` where the length does not fit.
    """
    value, state = tolerance.update(count, levels, state)
    value = jnp.asarray(value, dtype)
    if value.shape not in ((), (1,), (num_constraints,)):
        raise ValueError(
            f"tolerance: got shape {value.shape}, expected a scalar or ({num_constraints},): one for each retain "
            "constraint"
        )
    return jnp.broadcast_to(value, (num_constraints,)), state


def check_levels(levels: chex.Array | None, losses: chex.Array | None, num_constraints: int) -> chex.Array | None:
    """The retain levels that a tolerance reads: `levels` if given, else the retain losses of the batch."""
    if levels is None:
        return None if losses is None else losses[1:]
    levels = jnp.asarray(levels)
    if levels.shape != (num_constraints,):
        raise ValueError(
            f"levels: got shape {levels.shape}, expected ({num_constraints},): one measured level for each retain "
            "constraint"
        )
    return levels


def resolve_num_objectives(num_objectives: int | None, *num_constraints: int | None) -> int | None:
    """K, from the argument or from the lengths of per-constraint values; raises `ValueError` where they disagree."""
    if isinstance(num_objectives, jax.Array):
        raise ValueError(
            "num_objectives: got an array, expected an int; optax.inject_hyperparams makes arrays of ints unless told "
            "static_args='num_objectives'"
        )
    if num_objectives is not None and num_objectives < 2:
        raise ValueError(f"num_objectives: got {num_objectives}, expected K >= 2: one forget and K-1 retain objectives")
    for length in num_constraints:
        if length is not None and num_objectives is not None and length != num_objectives - 1:
            raise ValueError(
                f"tolerance, retain_weight or initial_multiplier: got {length} values, expected {num_objectives - 1}: "
                "one for each retain constraint"
            )
        if length is not None:
            num_objectives = length + 1
    return num_objectives
