"""Controllers: optax transforms over the multipliers.

A controller receives the dual gradient estimate in descent sign (minus the violation) and the multipliers as its
`params`; its update is added to the multipliers, which `implicit_surgery` then projects to >= 0. Any optax optimizer is
one: `optax.sgd(rate)` is the paper's, `optax.adam(rate)` the released code's. Those here are meant for
`implicit_surgery(budget(limit, 1.0), controller, proxy="level")`, which feeds them the distance of the retain loss to
its limit; all work element by element, for any number of constraints, and keep their state in the optimizer state.
"""

from eupmu_jax.controllers.augmented_lagrangian import AugmentedLagrangianState, augmented_lagrangian
from eupmu_jax.controllers.nu_pi import NuPIState, nu_pi
from eupmu_jax.controllers.quadratic_penalty import QuadraticPenaltyState, quadratic_penalty

__all__ = [
    "AugmentedLagrangianState",
    "NuPIState",
    "QuadraticPenaltyState",
    "augmented_lagrangian",
    "nu_pi",
    "quadratic_penalty",
]
