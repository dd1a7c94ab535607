"""Machine unlearning in JAX: unilateral gradient surgery as optax transforms."""

from eupmu_jax import aggregators, controllers, objectives, sharding, tasks, tolerances
from eupmu_jax.gradients.accumulation import AccumulateState, accumulate
from eupmu_jax.gradients.batches import shared_forward, stack_objectives
from eupmu_jax.gradients.value_and_grad import retain_losses, scalarized_value_and_grad, stacked_value_and_grad
from eupmu_jax.surgery.default_optimizer import default_optimizer
from eupmu_jax.surgery.eupmu import eupmu
from eupmu_jax.surgery.explicit import UnilateralSurgeryState, unilateral_surgery
from eupmu_jax.surgery.feasibility import (
    BestFeasible,
    BestFeasibleState,
    FurthestFeasible,
    best_feasible,
    furthest_feasible,
)
from eupmu_jax.surgery.freezing import freeze
from eupmu_jax.surgery.generalized_newton import ScaleByGenState, scale_by_gen
from eupmu_jax.surgery.guard import UtilityGuardState, utility_guard
from eupmu_jax.surgery.implicit import ImplicitSurgeryState, implicit_surgery, multipliers
from eupmu_jax.surgery.nonfinite import skip_nonfinite
from eupmu_jax.surgery.reference import reference_surgery
from eupmu_jax.surgery.steps import explicit_step, implicit_step
from eupmu_jax.surgery.two_pass import TwoPass, TwoPassState, two_pass
from eupmu_jax.tasks import Task
from eupmu_jax.training._reached import Reached
from eupmu_jax.training.levels import Comparison, Level, unseen_level, unseen_levels
from eupmu_jax.training.unlearning import Unlearned, unlearn

__version__ = "0.1.0"

__all__ = [
    "AccumulateState",
    "BestFeasible",
    "BestFeasibleState",
    "Comparison",
    "FurthestFeasible",
    "ImplicitSurgeryState",
    "Level",
    "Reached",
    "ScaleByGenState",
    "Task",
    "TwoPass",
    "TwoPassState",
    "UnilateralSurgeryState",
    "Unlearned",
    "UtilityGuardState",
    "accumulate",
    "aggregators",
    "best_feasible",
    "controllers",
    "default_optimizer",
    "eupmu",
    "explicit_step",
    "freeze",
    "furthest_feasible",
    "implicit_step",
    "implicit_surgery",
    "multipliers",
    "objectives",
    "reference_surgery",
    "retain_losses",
    "scalarized_value_and_grad",
    "scale_by_gen",
    "sharding",
    "shared_forward",
    "skip_nonfinite",
    "stack_objectives",
    "stacked_value_and_grad",
    "tasks",
    "tolerances",
    "two_pass",
    "unilateral_surgery",
    "unlearn",
    "unseen_level",
    "unseen_levels",
    "utility_guard",
]
