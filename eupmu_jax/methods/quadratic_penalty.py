"""A growing quadratic penalty on the level of the retain loss."""

from eupmu_jax import controllers
from eupmu_jax.methods.augmented_lagrangian import PENALTY, level_descent
from eupmu_jax.methods.method import FORGET_OBJECTIVE, LEARNING_RATE, Method, Procedure


def quadratic_penalty(task, terms, settings) -> Procedure:
    r"""Descent on :math:`l_f + \tfrac{\rho_t}{2} [e]_+^2`, :math:`e = l_r(\theta) - l_r(\theta_0) - B`.

    The weight of the retain gradient is :math:`\rho_t [e]_+`, with e from the previous retain batch; in the first step,
    which has none, it is 1. rho starts at `penalty` and grows by 1 % in every step with a violation
    (`controllers.quadratic_penalty`). B is `allowed_rise` nats, 0.02 by default.

    Failure cases: the retain loss settles lambda / rho above its limit, and a finite rho never closes the gap. Below
    the limit nothing holds the retain loss back, so that steps there are plain steps on the forget objective.

    Source: Nocedal and Wright 2006, Numerical Optimization, section 17.1.
    """
    return level_descent(task, terms, settings, controllers.quadratic_penalty(settings["penalty"]))


METHOD = Method(
    quadratic_penalty,
    paper="Nocedal and Wright 2006",
    passes="1F 1B forget and retain",
    needs="forget and retain sets",
    space={"learning_rate": LEARNING_RATE, "forget_objective": FORGET_OBJECTIVE, "penalty": PENALTY},
    optional=("allowed_rise",),
)
