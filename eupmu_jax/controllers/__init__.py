"""Controllers: transforms that decide how much each objective counts.

`forget_level` and `retain_limit` go before a surgery or an aggregator and weight the rows of stacked gradients by
figures measured on their batches; `scale_by_limit` goes after an optimizer and sets the length of its steps. The others
are optax transforms over the multipliers.

Such a controller receives the dual gradient estimate in descent sign (minus the violation) and the multipliers as its
`params`; its update is added to the multipliers, which `implicit_surgery` then projects to >= 0. Any optax optimizer
can serve as one: `optax.sgd(rate)` is the paper's, `optax.adam(rate)` the released code's. Those here are meant for
`implicit_surgery(budget(limit, 1.0), controller, proxy="level")`, which feeds them the distance from the retain loss to
its limit. All work elementwise, for any number of constraints, and keep their state in the optimizer state.
"""

from eupmu_jax.controllers._steering import SteeringState
from eupmu_jax.controllers.augmented_lagrangian import AugmentedLagrangianState, augmented_lagrangian
from eupmu_jax.controllers.forget_level import forget_level
from eupmu_jax.controllers.nu_pi import NuPIState, nu_pi
from eupmu_jax.controllers.quadratic_penalty import QuadraticPenaltyState, quadratic_penalty
from eupmu_jax.controllers.retain_limit import retain_limit
from eupmu_jax.controllers.scale_by_limit import ScaleByLimitState, scale_by_limit

__all__ = [
    "AugmentedLagrangianState",
    "NuPIState",
    "QuadraticPenaltyState",
    "ScaleByLimitState",
    "SteeringState",
    "augmented_lagrangian",
    "forget_level",
    "nu_pi",
    "quadratic_penalty",
    "retain_limit",
    "scale_by_limit",
]
