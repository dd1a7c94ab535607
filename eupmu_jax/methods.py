"""Unlearning methods for a classifier, under one contract: a step over a forget and a retain batch."""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from eupmu_jax import objectives, tolerances
from eupmu_jax.batches import SharedForward, shared_forward
from eupmu_jax.explicit import unilateral_surgery
from eupmu_jax.gradients import scalarized_value_and_grad, stacked_value_and_grad
from eupmu_jax.implicit import implicit_surgery
from eupmu_jax.nonfinite import skip_nonfinite
from eupmu_jax.stacked import gram_matrix
from eupmu_jax.steps import explicit_step, implicit_step

# The same for every method, so that none is favoured by it.
MAX_NORM = 1.0

# Rate of the budget in units of 1 / learning rate. Above 1 the demanded decrease would overshoot, were it not for
# clipping, which makes of any demand a step of the usual length, so that the retain gradient dominates it.
# Picked by hand among 3, 10, 30 and 100 on digits, seed 0; not part of the equal tuning.
BARRIER_RATE = 100.0


class Settings(NamedTuple):
    """What is tuned, for every method alike; a method reads those that concern it.

    Attributes:
      learning_rate: Peak; it decays linearly to 0 over the run.
      forget_objective: "random_labels", "gradient_ascent" or "bounded_ascent".
      retain_weight: Weight of the retain loss where it is fixed, and the multiplier's initial value where it is not.
      multiplier_learning_rate: beta of implicit surgery.
      allowed_rise: How much the retain loss may rise over the whole run, in nats. Explicit surgery keeps to it by a
        budget (a barrier on the level); implicit surgery, as in the paper, by step tolerances that add up to it.
    """

    learning_rate: float
    forget_objective: str = "random_labels"
    retain_weight: float = 0.0
    multiplier_learning_rate: float = 0.0
    allowed_rise: float = 0.0


class Procedure(NamedTuple):
    """A method made ready to run.

    Attributes:
      init: `params -> state`.
      step: `(params, state, (forget_batch, retain_batch)) -> (params, state)`; batches are dicts of `images`, `labels`
        and `random_labels`.
      forward, backward: Passes over the `(forget, retain)` batch in each step.
    """

    init: Callable
    step: Callable
    forward: tuple[int, int]
    backward: tuple[int, int]


def loss_of(apply: Callable, forget_objective: str) -> SharedForward:
    """Forget and retain losses of a classifier `apply(params, images) -> logits`, sharing its forward pass."""
    heads = {
        "random_labels": lambda logits, batch: objectives.cross_entropy(logits, batch["random_labels"]),
        "gradient_ascent": lambda logits, batch: objectives.gradient_ascent(logits, batch["labels"]),
        "bounded_ascent": lambda logits, batch: objectives.bounded_ascent(logits, batch["labels"]),
    }
    if forget_objective not in heads:
        raise ValueError(f"forget_objective: got {forget_objective!r}, expected one of {', '.join(heads)}")
    retain_head = lambda logits, batch: objectives.cross_entropy(logits, batch["labels"])
    return shared_forward(lambda params, batch: apply(params, batch["images"]), [heads[forget_objective], retain_head])


def _schedule(settings, steps):
    return optax.linear_schedule(settings.learning_rate, 0.0, steps)


def _sgd(settings, steps):
    return optax.chain(optax.clip_by_global_norm(MAX_NORM), optax.sgd(_schedule(settings, steps)))


def _weighted(apply, settings, steps, weights):
    """SGD on a fixed combination of the two losses; a batch of weight 0 is not looked at."""
    optimizer = _sgd(settings, steps)
    loss = loss_of(apply, settings.forget_objective)

    def gradient(params, batches):
        if all(weights):
            multipliers = jnp.array([weights[1] / weights[0]])
            return scalarized_value_and_grad(loss)(params, batches, multipliers)[1]
        k = 0 if weights[0] else 1
        return jax.grad(lambda p: loss.heads[k](loss.forward(p, batches[k]), batches[k]))(params)

    def step(params, state, batches):
        updates, state = optimizer.update(gradient(params, batches), state, params)
        return optax.apply_updates(params, updates), state

    passes = int(weights[0] != 0), int(weights[1] != 0)
    return Procedure(optimizer.init, step, passes, passes)


def fine_tuning(apply, settings: Settings, steps: int, retain_loss: float) -> Procedure:
    """Training goes on with the retain set alone."""
    return _weighted(apply, settings, steps, (0, 1))


def gradient_ascent(apply, settings: Settings, steps: int, retain_loss: float) -> Procedure:
    """Ascent on the cross-entropy of the forget set alone."""
    return _weighted(apply, settings._replace(forget_objective="gradient_ascent"), steps, (1, 0))


def random_labels(apply, settings: Settings, steps: int, retain_loss: float) -> Procedure:
    """Linear scalarisation: random labels on the forget set plus `retain_weight` times the retain loss."""
    return _weighted(apply, settings._replace(forget_objective="random_labels"), steps, (1, settings.retain_weight))


def eupmu_explicit(apply, settings: Settings, steps: int, retain_loss: float) -> Procedure:
    """Unilateral surgery in closed form on stacked gradients, under a budget for the level of the retain loss."""
    rate = BARRIER_RATE / settings.learning_rate
    surgery = unilateral_surgery(tolerances.budget(retain_loss + settings.allowed_rise, rate))
    optimizer = skip_nonfinite(optax.chain(surgery, _sgd(settings, steps)))
    step = explicit_step(loss_of(apply, settings.forget_objective), optimizer)
    return Procedure(optimizer.init, lambda *args: step(*args)[:2], (1, 1), (1, 1))


def _eupmu_implicit(apply, settings, steps, proxy, forward):
    sum_of_learning_rates = settings.learning_rate * (steps + 1) / 2
    surgery = implicit_surgery(
        settings.allowed_rise / sum_of_learning_rates,
        optax.sgd(settings.multiplier_learning_rate),
        proxy=proxy,
        learning_rate=_schedule(settings, steps),
        initial_multiplier=settings.retain_weight,
    )
    optimizer = skip_nonfinite(optax.chain(_sgd(settings, steps), surgery))
    step = implicit_step(loss_of(apply, settings.forget_objective), optimizer)
    return Procedure(optimizer.init, lambda *args: step(*args)[:2], forward, (1, 1))


def eupmu_implicit(apply, settings: Settings, steps: int, retain_loss: float) -> Procedure:
    """Implicit surgery; a second forward pass over the retain batch measures the step."""
    return _eupmu_implicit(apply, settings, steps, "same_batch", (1, 2))


def eupmu_next_batch(apply, settings: Settings, steps: int, retain_loss: float) -> Procedure:
    """Implicit surgery; the next batch measures the step."""
    return _eupmu_implicit(apply, settings, steps, "next_batch", (1, 1))


METHODS: dict[str, Callable[[Callable, Settings, int, float], Procedure]] = {
    "fine-tuning": fine_tuning,
    "gradient ascent": gradient_ascent,
    "random labels": random_labels,
    "EUPMU explicit": eupmu_explicit,
    "EUPMU implicit": eupmu_implicit,
    "EUPMU next-batch": eupmu_next_batch,
}


def cosine(loss: SharedForward, params: chex.ArrayTree, batches) -> chex.Array:
    """Cosine between the forget and the retain gradient on `batches`; 0 if either is zero."""
    gram = gram_matrix(stacked_value_and_grad(loss)(params, batches)[1])
    norms = jnp.sqrt(gram[0, 0] * gram[1, 1])
    return jnp.where(norms > 0, gram[0, 1] / jnp.where(norms > 0, norms, 1), 0.0)
