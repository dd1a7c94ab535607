"""A quadratic penalty that grows while it is not enough, as a controller."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from eupmu_jax._stack.checks import check_numbers


class QuadraticPenaltyState(NamedTuple):
    """State of `quadratic_penalty`.

    Attributes:
      penalty: rho for each constraint, shaped like the multipliers.
    """

    penalty: chex.ArrayTree


def quadratic_penalty(
    penalty: float, growth: float = 1.01, violation_tolerance: float = 1e-4
) -> optax.GradientTransformation:
    r"""Weights the retain gradient by :math:`\lambda = \rho [e]_+`, :math:`e = l_k - limit_k`.

    .. math::
      \lambda_{t+1} = \rho_t [e_t]_+, \qquad
      \rho_{t+1} = \text{growth} \cdot \rho_t \;\text{ while } e_t > \text{violation\_tolerance}

    This is the gradient of :math:`\tfrac{\rho}{2} [e]_+^2`: nothing is held back below the limit, and the loss settles
    lambda / rho above it. Growth shrinks that gap but makes the problem ever stiffer, as rho never falls again. It
    grows at most to the square root of the largest number of its dtype, 2e19 in float32.

    Args:
      penalty: Initial rho > 0, multiplier per unit of the loss.
      growth: At least 1.
      violation_tolerance: Violation, in units of the loss, up to which rho does not grow.

    Returns:
      A transform over multipliers that receives -e and needs the multipliers as `params`.

    Raises:
      ValueError: For a penalty that is not positive, a growth below 1, or missing `params`.

    >>> controller = quadratic_penalty(penalty=2.0, growth=1.5)
    >>> multiplier = jnp.zeros(1)
    >>> state = controller.init(multiplier)
    >>> move, state = controller.update(-jnp.array([0.5]), state, multiplier)
    >>> (multiplier + move).tolist(), state.penalty.tolist()
    ([1.0], [3.0])
    """
    check_numbers("penalty", penalty, above=0, finite=True)
    check_numbers("growth", growth, 1, finite=True)
    check_numbers("violation_tolerance", violation_tolerance, finite=True)

    def init_fn(params):
        return QuadraticPenaltyState(jax.tree.map(lambda m: jnp.full_like(m, penalty), params))

    def update_fn(updates, state, params=None):
        if params is None:
            raise ValueError("params: got None, expected the multipliers: controller.update(updates, state, params)")
        moves = jax.tree.map(lambda rho, g, old: rho * jnp.maximum(-g, 0) - old, state.penalty, updates, params)

        def grow(rho, g):
            most = jnp.sqrt(jnp.finfo(rho.dtype).max)
            return jnp.where(-g > violation_tolerance, jnp.minimum(growth * rho, jnp.maximum(most, rho)), rho)

        return moves, QuadraticPenaltyState(jax.tree.map(grow, state.penalty, updates))

    return optax.GradientTransformation(init_fn, update_fn)
