"""The augmented Lagrangian of Powell, Hestenes and Rockafellar as a controller."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from eupmu_jax._stack.checks import check_numbers


class AugmentedLagrangianState(NamedTuple):
    """State of `augmented_lagrangian`.

    Attributes:
      dual: The multiplier estimate mu, shaped like the multipliers; the gradient's weight is mu plus the penalty term.
    """

    dual: chex.ArrayTree


def augmented_lagrangian(
    penalty: chex.Numeric, dual_learning_rate: "chex.Numeric | None" = None
) -> optax.GradientTransformation:
    r"""Weights the retain gradient as the augmented Lagrangian of e <= 0 does, :math:`e = l_k - limit_k`.

    .. math::
      \mu_{t+1} = \max(0, \mu_t + \eta e_t), \qquad \lambda_{t+1} = \max(0, \mu_{t+1} + \rho e_t)

    :math:`\lambda` is the derivative of :math:`([\mu + \rho e]_+^2 - \mu^2) / 2\rho`. It is a PI controller whose
    proportional part acts on the violation alone, not on its change, so that a loss far below its limit is free to
    rise. mu drives the violation to zero; rho damps the approach.

    Args:
      penalty: rho > 0, multiplier per unit of the loss.
      dual_learning_rate: eta; None is rho, as in the classical method, which minimises fully between two updates. With
        an update in every gradient step, a smaller value is less prone to oscillation.

    Returns:
      A transform over multipliers that receives -e and needs the multipliers as `params`.

    Raises:
      ValueError: For a penalty that is not positive, a negative rate, or missing `params`.

    >>> controller = augmented_lagrangian(penalty=2.0)
    >>> multiplier = jnp.zeros(1)
    >>> state = controller.init(multiplier)
    >>> move, state = controller.update(-jnp.array([0.5]), state, multiplier)
    >>> (multiplier + move).tolist(), state.dual.tolist()
    ([2.0], [1.0])
    """
    rate = penalty if dual_learning_rate is None else dual_learning_rate
    check_numbers("penalty", penalty, above=0, finite=True)
    check_numbers("dual_learning_rate", rate, 0, finite=True)

    def init_fn(params):
        return AugmentedLagrangianState(dual=jax.tree.map(jnp.array, params))

    def update_fn(updates, state, params=None):
        if params is None:
            raise ValueError("params: got None, expected the multipliers: controller.update(updates, state, params)")
        dual = jax.tree.map(lambda mu, g: jnp.maximum(mu - rate * g, 0), state.dual, updates)
        moves = jax.tree.map(lambda mu, g, old: jnp.maximum(mu - penalty * g, 0) - old, dual, updates, params)
        return moves, AugmentedLagrangianState(dual)

    return optax.GradientTransformation(init_fn, update_fn)
