"""How hard to forget: the weight of the forget gradient follows the distance of its batch's error from a level."""

import chex
import numpy as np
import optax

from eupmu_jax._stack import checks
from eupmu_jax.controllers._steering import steer


def forget_level(
    target: "chex.Numeric | optax.Schedule",
    *,
    proportional: chex.Numeric = 20.0,
    integral: chex.Numeric = 0.0,
    decay: chex.Numeric = 0.9,
    max_weight: chex.Numeric = 1.0,
    num_objectives: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies row 0 of stacked gradients by a weight that vanishes once the forget set has reached a level.

    .. math::
      m_t = \beta m_{t-1} + (1 - \beta) e_t, \qquad \ell_t = m_t / (1 - \beta^t), \qquad x_t = \ell^* - \ell_t \\
      I_t = \mathrm{clip}(I_{t-1} + K_I x_t, 0, w_{max}), \qquad w_t = \mathrm{clip}(K_P x_t + I_t, 0, w_{max})

    with :math:`I_t = I_{t-1}` where :math:`x_t > 0` and :math:`K_P x_t + I_{t-1} \ge w_{max}`, that is, while the
    weight is saturated.

    :math:`e_t` is a figure of the forget batch that grows as it is forgotten: the error rate, or any `task.error`.
    The transform goes before a surgery or an aggregator: `optax.chain(forget_level(0.1), unilateral_surgery(), ...)`.

    **Steady state.** If forgetting needs the weight :math:`w^*` to balance the retain gradient, P control
    (:math:`K_I = 0`) settles at :math:`\ell^* - w^* / K_P`, short of the target; with :math:`K_I > 0` it settles at the
    target itself, provided that :math:`w^* < w_{max}`. If :math:`w^* \ge w_{max}` the weight saturates, and the level
    settles where that weight takes it: the target is out of reach at this cost. The integral never leaves
    :math:`[0, w_{max}]` and is held while the weight is saturated, so a long approach stores nothing that would carry
    the level past the target, or keep the weight saturated at an error of 1, which no level exceeds.

    **Noise.** The error rate of n examples has the standard deviation :math:`\sqrt{\ell (1 - \ell) / n}`, 3.8 points
    for n = 64 and a level of 10 %. Smoothing scales it by :math:`\sqrt{(1 - \beta) / (1 + \beta)}`, to 0.9 points for
    :math:`\beta = 0.9`, where the weight sees about :math:`1 / (1 - \beta)` steps. A :math:`K_P` far above
    :math:`w_{max}` over 0.9 points turns the controller into a switch. The weight is never negative: under P control,
    at a level that is on target with noise :math:`\sigma`, its mean is :math:`0.4 K_P \sigma` rather than 0, so the
    level settles somewhat above where it would without noise. The integral is not negative either: it corrects this
    only if that mean is below :math:`w^*`; otherwise the level settles above the target.

    **Guarantee.** The rows of the retain objectives are unchanged, so a surgery after this transform keeps
    :math:`\langle d, g_k \rangle \ge -\epsilon_k`, whatever the weight: forgetting never costs more utility than the
    tolerance allows. With a weight of 0, the step serves the retain objectives alone.

    Args:
      target: :math:`\ell^*`, a number or a schedule of the step count (a ramp, say).
      proportional, integral: :math:`K_P, K_I \ge 0`, weight per unit of the figure (and step).
      decay: :math:`\beta` in [0, 1); the average is bias-corrected, so that the first steps count too.
      max_weight: :math:`w_{max} > 0`.
      num_objectives: K, checked if it is given.

    Returns:
      A transform whose `update` takes stacked gradients and `errors`, `(K,)` figures of the batches, and returns
      stacked gradients. Its state is a `SteeringState`, with one entry. A figure, a loss or a target that is not finite
      makes the stack NaN, which a surgery or an aggregator refuses, and changes nothing but `nonfinite_count`. It does
      not look at the gradients: wrap the chain in `skip_nonfinite`, so that a step refused because of them leaves this
      state unchanged too. Placed before `accumulate` it sees the figure of every microbatch; placed inside, their mean.

    Raises:
      ValueError: For a target or gain that is negative, NaN, infinite or not a single number, a decay outside [0, 1), a
        `max_weight` that is not positive, a `num_objectives` that is not an int above 1, and in `update` without
        `errors`.

    Source: proportional and integral control with clamping, Astrom and Murray, "Feedback Systems", 2nd edition,
    section 11.4.

    >>> import jax.numpy as jnp
    >>> tx = forget_level(target=0.5, proportional=2.0)
    >>> grads = jnp.array([[1.0, 1.0], [3.0, 3.0]])  # forget, retain
    >>> scaled, state = tx.update(grads, tx.init(jnp.zeros(2)), errors=jnp.array([0.25, 0.0]))
    >>> scaled[0].round(3).tolist(), state.levels.round(3).tolist()
    ([0.5, 0.5], [0.25])
    """
    if not callable(target) and checks.check_numbers("target", target, 0, finite=True, why=", or a schedule"):
        raise ValueError(f"target: got shape {np.shape(target)}, expected one number, or a schedule")
    return steer(
        slice(0, 1),
        target,
        sign=1,
        proportional=proportional,
        integral=integral,
        decay=decay,
        min_weight=0.0,
        max_weight=max_weight,
        num_objectives=num_objectives,
    )
