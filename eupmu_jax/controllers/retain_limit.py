"""How firmly to retain: the weight of the retain gradients follows the violation of a limit in the error itself."""

import chex
import optax

from eupmu_jax._stack import checks
from eupmu_jax.controllers._steering import steer


def retain_limit(
    limit: "chex.Numeric | optax.Schedule",
    *,
    proportional: chex.Numeric = 20.0,
    integral: chex.Numeric = 0.0,
    decay: chex.Numeric = 0.9,
    max_weight: chex.Numeric = 10.0,
    num_objectives: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies the retain rows of stacked gradients by weights that rise where their error exceeds a limit.

    .. math::
      x_t = \ell_t - limit, \qquad I_t = \mathrm{clip}(I_{t-1} + K_I x_t, 0, w_{max} - 1), \qquad
      w_t = 1 + \mathrm{clip}(K_P x_t + I_t, 0, w_{max} - 1)

    with the smoothed figure :math:`\ell_t` of `forget_level`, and, as there, :math:`I_t = I_{t-1}` while the weight is
    saturated. The limit is in a familiar unit: an error rate of 0.02 is two points of accuracy. An error rate has no
    gradient, so its violation moves the weight and the gradient of the loss moves the model, as in the proxy-Lagrangian
    (Cotter et al. 2019, "Two-Player Games for Efficient Non-Convex Constrained Optimization").

    The effect of the weight depends on what follows: in a weighted sum (`aggregators.mean`) it is the multiplier. A
    surgery with tolerance 0 ignores it, since the direction does not depend on the length of a retain row; with a
    `retain_weight` r > 0 the least multiplier becomes r w. A positive tolerance :math:`\epsilon` becomes
    :math:`\epsilon / w`, so the surgery's guarantee holds, and more. A negative one, as when a `budget` is exceeded,
    becomes :math:`\epsilon / w` too: the surgery then demands a smaller decrease, unless the `retain_weight` does more.

    Within the limit the weight is 1, as if this transform were not there. Above it the violation settles at
    :math:`(w^* - 1) / K_P`, or at 0 with an integral part. `forget_level` describes this, and the effect of noise.

    Args:
      limit: Limit on the figure: a number or a schedule of the step count, for all retain rows, or one number for each
        of them. It is absolute; to allow a rise above the start, add that to the original model's error on the whole
        retain set.
      proportional, integral: :math:`K_P, K_I \ge 0`, weight per unit of the figure (and step).
      decay: As in `forget_level`.
      max_weight: :math:`w_{max} > 1`.
      num_objectives: K, needed for K > 2 where the state must keep one shape.

    Returns:
      A transform whose `update` takes stacked gradients and `errors`, as `forget_level`'s, with a `SteeringState` of
      K - 1 entries.

    Raises:
      ValueError: For a limit or gain that is negative, NaN or infinite, a decay outside [0, 1), a `max_weight` of at
        most 1, and in `update` without `errors`.

    >>> import jax.numpy as jnp
    >>> tx = retain_limit(0.02, proportional=50.0)
    >>> grads = jnp.ones((2, 1))
    >>> scaled, state = tx.update(grads, tx.init(jnp.zeros(1)), errors=jnp.array([0.5, 0.04]))
    >>> scaled.round(3).tolist()
    [[1.0], [2.0]]
    """
    if not callable(limit):
        length = checks.check_numbers("limit", limit, 0, finite=True, why=", or a schedule")
        if length is not None and num_objectives not in (None, length + 1):
            raise ValueError(
                f"limit: got {length} values, expected {num_objectives - 1}: one for each retain objective"
            )
        num_objectives = num_objectives if length is None else length + 1
    checks.check_number("max_weight", max_weight, above=1, finite=True)
    return steer(
        slice(1, None),
        limit,
        sign=-1,
        proportional=proportional,
        integral=integral,
        decay=decay,
        min_weight=1.0,
        max_weight=max_weight,
        num_objectives=num_objectives,
    )
