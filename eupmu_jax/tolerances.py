"""Tolerances: how fast each retain loss may rise, in units of the loss per unit of step size.

A tolerance epsilon always means an *allowed increase*: with theta <- theta - alpha * d, the surgery keeps
<g_r, d> >= -epsilon, so the retain loss rises by at most alpha * epsilon in a step, to first order.
"""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np


class Tolerance(NamedTuple):
    """A rule for the tolerance of a step.

    Attributes:
      evaluate: `(count, losses) -> epsilon`, where `count` is the number of steps taken, `losses` the `(K,)` losses of
        this step or None, and epsilon a scalar or a `(K-1,)` array.
      num_constraints: K-1 if the rule fixes it, else None.
    """

    evaluate: Callable[[chex.Numeric, chex.Array | None], chex.Numeric]
    num_constraints: int | None = None


def constant(tolerance: chex.Numeric) -> Tolerance:
    """The same tolerance in every step: a float for all constraints or a `(K-1,)` array.

    Raises:
      ValueError: If `tolerance` is negative or NaN, or has more than one dimension.

    >>> float(constant(0.1).evaluate(0, None))
    0.1...
    """
    if np.ndim(tolerance) > 1:
        raise ValueError(f"tolerance: got shape {np.shape(tolerance)}, expected a float or one value per constraint")
    if not isinstance(tolerance, jax.core.Tracer) and not np.all(np.asarray(tolerance) >= 0):
        raise ValueError(
            f"tolerance: got {tolerance}, expected numbers >= 0: it is the increase of the retain loss that is allowed"
        )
    return Tolerance(lambda count, losses: jnp.asarray(tolerance), np.size(tolerance) if np.ndim(tolerance) else None)


def schedule(schedule_fn: Callable[[chex.Numeric], chex.Numeric]) -> Tolerance:
    """A tolerance that follows an optax schedule of the step count.

    >>> float(schedule(lambda count: 0.5 * count).evaluate(3, None))
    1.5
    """
    return Tolerance(lambda count, losses: jnp.asarray(schedule_fn(count)))


def relative(share: chex.Numeric) -> Tolerance:
    """A share of the current retain losses: epsilon_k = share * l_k. Reads `losses`.

    >>> relative(0.1).evaluate(0, jnp.array([1.0, 2.0, 4.0])).round(3).tolist()
    [0.2..., 0.4...]
    """
    shares = constant(share)
    return Tolerance(
        lambda count, losses: shares.evaluate(count, losses) * _retain_losses(losses, "relative"),
        shares.num_constraints,
    )


def budget(limit: chex.Numeric, rate: chex.Numeric) -> Tolerance:
    r"""A barrier that keeps every retain loss under `limit`: :math:`\epsilon_k = rate \cdot (limit - l_k)`.

    Along the flow the retain loss then obeys :math:`\dot l_k \le rate \cdot (limit - l_k)` and approaches its limit
    without crossing it, however long the run; a loss above the limit is brought down at the same rate (its epsilon is
    negative). With step size alpha the discrete bound holds to first order for `alpha * rate <= 1`, for the losses
    given: minibatch losses bound the minibatch loss. Reads `losses`.

    Args:
      limit: Loss that must not be exceeded, a float or `(K-1,)`.
      rate: Positive float, per unit of step size.

    >>> budget(limit=2.0, rate=10.0).evaluate(0, jnp.array([5.0, 1.5])).tolist()
    [5.0]
    """
    limits = constant(limit)
    if not isinstance(rate, jax.core.Tracer) and not np.all(np.asarray(rate) >= 0):
        raise ValueError(f"rate: got {rate}, expected a number >= 0")
    return Tolerance(
        lambda count, losses: rate * (limits.evaluate(count, losses) - _retain_losses(losses, "budget")),
        limits.num_constraints,
    )


def _retain_losses(losses, rule):
    if losses is None:
        raise ValueError(f"losses: got None, but the tolerance {rule!r} reads them; call update(..., losses=losses)")
    return losses[1:]


def as_tolerance(tolerance: "chex.Numeric | Callable | Tolerance") -> Tolerance:
    """A float, a `(K-1,)` array, a schedule `count -> tolerance` or a `Tolerance`, as a `Tolerance`."""
    if isinstance(tolerance, Tolerance):
        return tolerance
    return schedule(tolerance) if callable(tolerance) else constant(tolerance)


def evaluate(tolerance: Tolerance, count: chex.Array, losses: chex.Array | None, num_constraints: int, dtype):
    """The tolerance of this step as a `(K-1,)` array; raises `ValueError` where its length does not fit."""
    value = jnp.asarray(tolerance.evaluate(count, losses), dtype)
    if value.shape not in ((), (1,), (num_constraints,)):
        raise ValueError(
            f"tolerance: got shape {value.shape}, expected a scalar or ({num_constraints},): one for each retain "
            "constraint"
        )
    return jnp.broadcast_to(value, (num_constraints,))


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
                f"tolerance or initial_multiplier: got {length} values, expected {num_objectives - 1}: one for each "
                "retain constraint"
            )
        if length is not None:
            num_objectives = length + 1
    return num_objectives
