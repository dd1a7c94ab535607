"""Tolerances: how fast each retain loss may rise, in units of the loss per unit of step size.

A tolerance epsilon always means an *allowed increase*: with `theta <- theta - alpha * d`, the surgery keeps
`<g_r, d> >= -epsilon`, so the retain loss rises by at most `alpha * epsilon` in a step, to first order.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax.numpy as jnp
import optax

from eupmu_jax._stack.checks import check_numbers
from eupmu_jax._stack.checks import resolve_num_objectives as resolve_num_objectives

# Smaller step sizes count as 0: their inverse, times a loss, overflows float32.
LEAST_STEP_SIZE = 1e-20


class Tolerance(NamedTuple):
    """A rule for the tolerance of a step; like an optax transform, it has a state.

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
    why = ": it is the allowed increase of the retain loss"
    num_constraints = check_numbers("tolerance", tolerance, 0, why=why)
    return stateless(lambda count, levels: jnp.asarray(tolerance), num_constraints)


def schedule(schedule_fn: Callable[[chex.Numeric], chex.Numeric]) -> Tolerance:
    """A tolerance that follows an optax schedule of the step count.

    >>> float(schedule(lambda count: 0.5 * count).update(3, None, ())[0])
    1.5
    """
    return stateless(lambda count, levels: jnp.asarray(schedule_fn(count)))


def relative(share: chex.Numeric) -> Tolerance:
    """A share of the current retain losses: epsilon_k = share * |l_k|. Reads the losses.

    In log scale, `constant(share)` gives a share of the loss itself.

    Raises:
      ValueError: If `share` is negative or NaN, or has more than one dimension.

    >>> relative(0.1).update(0, jnp.array([2.0, 4.0]), ())[0].round(3).tolist()
    [0.2..., 0.4...]
    """
    num_constraints = check_numbers("share", share, 0, why=", the allowed rise as a share of the retain loss")
    return stateless(lambda count, levels: jnp.asarray(share) * jnp.abs(_given(levels, "relative")), num_constraints)


def budget(
    limit: chex.Numeric,
    rate: "chex.Numeric | optax.Schedule | None" = None,
    *,
    learning_rate: "chex.Numeric | optax.Schedule | None" = None,
    relative_to_start: bool = False,
) -> Tolerance:
    r"""A barrier that keeps every retain loss under its limit: :math:`\epsilon_k = rate \cdot (limit - l_k)`.

    Along the flow the retain loss then obeys :math:`\dot l_k \le rate \cdot (limit - l_k)` and approaches its limit
    without crossing it, however long the run; a loss above the limit is brought down at the same rate (its epsilon is
    negative). The bound holds to first order and for the losses that are passed: minibatch losses bound the minibatch
    loss, `levels` measured on the whole retain set bound the loss on that set. Measure the final parameters, and pull
    them back with `furthest_feasible`.

    The rate decides how firm the barrier is, and its unit depends on where the tolerance goes:

    ==================================  ==============================================================
    in                                  give
    ==================================  ==============================================================
    `unilateral_surgery`, `two_pass`    `learning_rate`, the optimizer's: the rate is 1 / learning rate, so that one
                                        step may use up the distance to the limit and corrects any excess in full
    `utility_guard`                     `rate` <= 1, the share of the distance that one step may use up
    `implicit_surgery(proxy="level")`   `rate` 1.0, and the controller's gains do the rest
    ==================================  ==============================================================

    With a rate far below 1 / learning rate the barrier is weak: the loss may rise far above the limit first.

    Args:
      limit: Loss that must not be exceeded, a float or `(K-1,)`. Infinity means no limit, except in `implicit_surgery`,
        which cannot compare with it and refuses the step.
      rate: Positive float, or a schedule of the step count.
      learning_rate: Instead of `rate`: the step size, a positive float or the optimizer's own schedule. Where a
        schedule is 0 (below 1e-20) the tolerance is 0.
      relative_to_start: If true, `limit` is how much each retain loss may rise above its value in the first step.

    Raises:
      ValueError: For a limit that is NaN or has more than one dimension, a rate or learning rate that is not positive,
        or both or neither of them.

    >>> tolerance = budget(limit=2.0, learning_rate=0.1)
    >>> tolerance.update(0, jnp.array([1.5]), tolerance.init(1, jnp.float32))[0].tolist()
    [5.0]
    """
    num_constraints = check_numbers("limit", limit)
    rate_at = _rate_at(rate, learning_rate)

    def slack(count, levels, limits):
        rate = rate_at(count)
        return jnp.where(rate > 0, rate * (limits - levels), 0)

    if not relative_to_start:
        return stateless(
            lambda count, levels: slack(count, _given(levels, "budget"), jnp.asarray(limit)), num_constraints
        )

    def init_fn(num_constraints, dtype):
        # Infinity until the first level arrives, which becomes the start.
        return jnp.full(num_constraints, jnp.inf, dtype)

    def update_fn(count, levels, start):
        levels = _given(levels, "budget")
        start = jnp.where(jnp.isinf(start), levels, start).astype(start.dtype)
        return slack(count, levels, start + jnp.asarray(limit)), start

    return Tolerance(init_fn, update_fn, num_constraints)


def _rate_at(rate, learning_rate):
    """The barrier's rate as a function of the step count."""
    if (rate is None) == (learning_rate is None):
        raise ValueError(
            f"rate, learning_rate: got {'neither' if rate is None else 'both'}, expected one: learning_rate, the "
            "optimizer's own, for unilateral_surgery; rate=1.0 for a controller of the level; a rate of at most 1 for "
            "utility_guard"
        )
    for name, value in {"rate": rate, "learning_rate": learning_rate}.items():
        if value is not None and not callable(value):
            check_numbers(name, value, above=0, why=", or a schedule")
    if rate is not None:
        return rate if callable(rate) else lambda count: jnp.asarray(rate) if isinstance(rate, list | tuple) else rate

    def inverse(count):
        step_size = jnp.asarray(learning_rate(count) if callable(learning_rate) else learning_rate)
        # optax.inject_hyperparams hands it over in the parameters' dtype, and in float16 the inverse may overflow.
        step_size = step_size.astype(jnp.promote_types(step_size.dtype, jnp.float32))
        moves = step_size > LEAST_STEP_SIZE
        return jnp.where(moves, 1 / jnp.where(moves, step_size, 1), 0)

    return inverse


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
    # A model in half precision returns such losses, to which a limit and a rate must not be rounded.
    value, state = tolerance.update(count, None if levels is None else levels.astype(dtype), state)
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
