"""The methods that the budget experiments compare, as optimizers built from the numbers of a run."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

import eupmu_jax as eupmu
from eupmu_jax import controllers, tolerances


class Tuning(NamedTuple):
    """What is tuned, for every method alike.

    Attributes:
      learning_rate: The peak learning rate.
      gain: How strongly the method reacts, in its own unit; see `METHODS`.
      multiplier: The initial or fixed multiplier.
    """

    learning_rate: float
    gain: float = 1.0
    multiplier: float = 1.0


class Program(NamedTuple):
    """What decides the compiled code: a key of `METHODS`, "raw" or "log", a key of `OPTIMIZERS`."""

    method: str
    scale: str
    optimizer: str


OPTIMIZERS: dict[str, Callable] = {
    "sgd": lambda schedule: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(schedule)),
    "adam": optax.adam,
    "muon": optax.contrib.muon,
}


class Numbers(NamedTuple):
    """The numbers of a run, traced; `start`, `limit` and `tolerance` are on the scale of the losses, raw or log."""

    learning_rate: float
    gain: float
    multiplier: float
    start: float
    limit: float
    tolerance: float

    @property
    def unit(self):
        """`gain` per violation as large as the whole budget."""
        return self.gain / (self.limit - self.start)


def _steered(controller):
    """Implicit surgery whose controller sees the distance of the level from the limit."""

    def build(base, schedule, scale, n):
        rule = tolerances.budget(n.limit, 1.0)
        surgery = eupmu.implicit_surgery(rule, controller(n), scale, "level", initial_multiplier=n.multiplier)
        return optax.chain(base, surgery)

    return build


def _paper(base, schedule, scale, n):
    dual = optax.sgd(n.unit * n.learning_rate)
    surgery = eupmu.implicit_surgery(n.tolerance, dual, scale, learning_rate=schedule, initial_multiplier=n.multiplier)
    return optax.chain(base, surgery)


def _reference(base, schedule, scale, n):
    surgery = eupmu.reference_surgery(multiplier_learning_rate=n.gain, initial_multiplier=n.multiplier)
    return optax.chain(base, surgery)


def _fixed_weight(base, schedule, scale, n):
    keep = optax.set_to_zero()
    return optax.chain(base, eupmu.implicit_surgery(0.0, keep, scale, "level", initial_multiplier=n.multiplier))


def _barrier_surgery(n):
    return eupmu.unilateral_surgery(tolerances.budget(n.limit, 30 * n.gain / n.learning_rate))


METHODS: dict[str, Callable] = {
    "P": _paper,
    "I": _steered(lambda n: controllers.nu_pi(0.0, 0.1 * n.unit)),
    "PI": _steered(lambda n: controllers.nu_pi(n.unit, 0.1 * n.unit)),
    "PHR": _steered(lambda n: controllers.augmented_lagrangian(n.unit, 0.1 * n.unit)),
    "barrier": lambda base, schedule, scale, n: optax.chain(_barrier_surgery(n), base),
    "guard": lambda base, schedule, scale, n: eupmu.utility_guard(
        base, tolerances.budget(n.limit, 0.3), _barrier_surgery(n)
    ),
    "reference": _reference,
    "step tolerance": lambda base, schedule, scale, n: optax.chain(eupmu.unilateral_surgery(n.tolerance), base),
    "fixed weight": _fixed_weight,
}
STACKED = {"barrier", "guard", "step tolerance"}


def optimizer(program: Program, numbers: Numbers, decay: jax.Array) -> optax.GradientTransformationExtraArgs:
    """The whole chain; `decay` are the factors on the learning rate, one for each step."""
    schedule = lambda count: numbers.learning_rate * decay[jnp.minimum(count, len(decay) - 1)]
    base = OPTIMIZERS[program.optimizer](schedule)
    return eupmu.skip_nonfinite(METHODS[program.method](base, schedule, program.scale, numbers))
