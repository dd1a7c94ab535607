"""The nuPI controller (Sohrabi et al., "On PI Controllers for Updating Lagrange Multipliers", 2024)."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from eupmu_jax._stack.checks import check_numbers


class NuPIState(NamedTuple):
    """State of `nu_pi`.

    Attributes:
      average: Exponential average xi of the errors, shaped like the multipliers.
      count: Number of errors seen.
    """

    average: chex.ArrayTree
    count: chex.Array


def nu_pi(proportional: chex.Numeric, integral: chex.Numeric, nu: chex.Numeric = 0.0) -> optax.GradientTransformation:
    r"""Proportional and integral feedback on the violation e of a constraint, with a smoothed proportional part.

    .. math::
      \xi_t = \nu \xi_{t-1} + (1 - \nu) e_t, \qquad
      \lambda_{t+1} = \max\big(0, \lambda_t + K_I e_t + K_P (\xi_t - \xi_{t-1})\big), \qquad \xi_{-1} = e_0

    so that the first step is :math:`K_I e_0`. Fed with the *level*, :math:`e = l_k - limit_k`, it covers both ways to
    move a multiplier that are in use: `integral=0` is EUPMU, whose multiplier follows the change of the retain loss,
    with :math:`K_P = \beta / \alpha`; `proportional=0` is plain dual ascent. Only the integral part brings the
    violation to zero: EUPMU settles where the retain loss has risen by lambda / K_P.

    Anti-windup: the multiplier itself holds the integral and never leaves [0, inf), so a long time below the limit
    stores nothing that a violation would have to undo first.

    Args:
      proportional: K_P >= 0, multiplier per unit of the loss.
      integral: K_I >= 0, multiplier per unit of the loss and step.
      nu: In (-1, 1). 0 reacts at once; towards 1 the proportional part sees an average of about 1 / (1 - nu) steps.

    Returns:
      A transform over multipliers that receives -e.

    Raises:
      ValueError: For a negative gain, or `nu` outside (-1, 1).

    >>> controller = nu_pi(proportional=2.0, integral=0.5)
    >>> multiplier = jnp.array([1.0])
    >>> state = controller.init(multiplier)
    >>> moves = []
    >>> for error in (0.2, 0.4):
    ...     move, state = controller.update(-jnp.array([error]), state, multiplier)
    ...     moves.append(round(float(move[0]), 3))
    >>> moves  # 0.5 * 0.2, then 0.5 * 0.4 + 2 * (0.4 - 0.2)
    [0.1, 0.6]
    """
    check_numbers("proportional", proportional, 0, finite=True)
    check_numbers("integral", integral, 0, finite=True)
    check_numbers("nu", nu, above=-1, below=1)

    def init_fn(params):
        return NuPIState(average=jax.tree.map(jnp.zeros_like, params), count=jnp.zeros([], jnp.int32))

    def update_fn(updates, state, params=None):
        errors = jax.tree.map(jnp.negative, updates)
        previous = jax.tree.map(lambda e, xi: jnp.where(state.count > 0, xi, e), errors, state.average)
        average = jax.tree.map(lambda e, xi: nu * xi + (1 - nu) * e, errors, previous)
        moves = jax.tree.map(lambda e, new, old: integral * e + proportional * (new - old), errors, average, previous)
        if params is not None:
            moves = jax.tree.map(lambda move, multiplier: jnp.maximum(move, -multiplier), moves, params)
        return moves, NuPIState(average=average, count=optax.safe_increment(state.count))

    return optax.GradientTransformation(init_fn, update_fn)
