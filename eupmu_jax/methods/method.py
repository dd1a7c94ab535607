"""What every unlearning method for a classifier is made of: a problem, settings, and a step over two batches.

"Descent" in the methods' own words is that of `descent`: SGD or Adam, clipped, with a learning rate that falls to 0.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import chex
import jax
import optax

from eupmu_jax import objectives
from eupmu_jax.gradients.batches import SharedForward, shared_forward

# The same for every method, so that none is favoured by it.
MAX_NORM = 1.0

Batch = dict[str, chex.Array]
# Numbers may be traced, so that runs with other numbers share compiled code; strings choose the code.
Settings = Mapping[str, "chex.Numeric | str"]


class LogUniform(NamedTuple):
    """A positive setting, searched on a logarithmic scale."""

    low: float
    high: float


class Choice(NamedTuple):
    """A setting with few values."""

    options: tuple


# What the search offers every method that leaves the forget objective open, and the learning rates of Adam.
FORGET_OBJECTIVE = Choice(("random_labels", "bounded_ascent", "kl_to_uniform"))
LEARNING_RATE = LogUniform(3e-4, 1e-2)
MOMENTUM = Choice((0.0, 0.9))


class Problem(NamedTuple):
    """What is to be unlearned, as far as a method may know it.

    Attributes:
      apply: `apply(params, images) -> logits` of shape `(n, num_classes)`.
      fresh_params: `fresh_params(key)`: parameters that never saw the data.
      num_classes: Number of classes.
      num_forget, num_retain: Sizes of the two sets.
      steps: Optimizer steps of the run.
      retain_loss: The original model's mean cross-entropy over the whole retain set, in nats.
      passes: Forward passes of single examples that the run may make in all; a backward pass counts as two.
    """

    apply: Callable[[chex.ArrayTree, chex.Array], chex.Array]
    fresh_params: Callable[[chex.PRNGKey], chex.ArrayTree]
    num_classes: int
    num_forget: int
    num_retain: int
    steps: int
    retain_loss: chex.Numeric
    passes: float = math.inf


class Cost(NamedTuple):
    """Passes through the model.

    Attributes:
      forward, backward: For each example of the `(forget, retain)` batch, in each step.
      outside_forward, outside_backward: Examples passed before the first and after the last step, in all.
    """

    forward: tuple[float, float]
    backward: tuple[float, float]
    outside_forward: int = 0
    outside_backward: int = 0


class Procedure(NamedTuple):
    """A method made ready to run. The batches of both sets are dicts of `images`, `labels` and `random_labels`.

    Attributes:
      init: `(params, prepared) -> state`; it shares no array with its arguments.
      step: `(params, prepared, state, (forget_batch, retain_batch), count, key) -> (params, state)`, to be jitted;
        `count` are the steps made before.
      cost: Passes through the model.
      prepare: `(params, forget, retain, key) -> prepared`, called once with whole sets before the first step; None if
        there is nothing to prepare, and `prepared` is then ().
      finish: `(params, prepared, forget, retain) -> params`, called once after the last step, or None.
    """

    init: Callable
    step: Callable
    cost: Cost
    prepare: Callable | None = None
    finish: Callable | None = None


class Method(NamedTuple):
    """A row of the table of methods.

    Attributes:
      make: `(problem, settings) -> Procedure`.
      paper: Where it was published.
      passes: Forward and backward passes of a step and what else it costs, in words.
      needs: What it reads besides the original model.
      space: Settings that are searched, and where: as many dimensions for every method.
    """

    make: Callable[[Problem, Settings], Procedure]
    paper: str
    passes: str
    needs: str
    space: dict[str, LogUniform | Choice]


def loss_of(apply: Callable, forget_objective: str) -> SharedForward:
    """Forget and retain losses of a classifier `apply(params, images) -> logits`, sharing its forward pass."""
    heads = {
        "random_labels": lambda logits, batch: objectives.cross_entropy(logits, batch["random_labels"]),
        "gradient_ascent": lambda logits, batch: objectives.gradient_ascent(logits, batch["labels"]),
        "bounded_ascent": lambda logits, batch: objectives.bounded_ascent(logits, batch["labels"]),
        "kl_to_uniform": lambda logits, batch: objectives.kl_to_uniform(logits),
    }
    if forget_objective not in heads:
        raise ValueError(f"forget_objective: got {forget_objective!r}, expected one of {', '.join(heads)}")
    retain_head = lambda logits, batch: objectives.cross_entropy(logits, batch["labels"])
    return shared_forward(lambda params, batch: apply(params, batch["images"]), [heads[forget_objective], retain_head])


def learning_rate(problem: Problem, settings: Settings) -> optax.Schedule:
    """From the peak `settings["learning_rate"]` linearly to 0 over the run."""
    return optax.linear_schedule(settings["learning_rate"], 0.0, problem.steps)


def descent(problem: Problem, settings: Settings) -> optax.GradientTransformation:
    """The optimizer of every method: clipping to norm 1, SGD or Adam, a learning rate that falls linearly to 0.

    Settings: `optimizer` is "sgd" or "adam" (SGD if there is none), `momentum` that of SGD or of Adam's first moment
    (0 and 0.9 if there is none), `weight_decay` a decoupled decay.
    """
    decay = optax.add_decayed_weights(settings["weight_decay"]) if "weight_decay" in settings else optax.identity()
    scaling = optax.scale_by_learning_rate(learning_rate(problem, settings))
    return optax.chain(optax.clip_by_global_norm(MAX_NORM), _preconditioner(settings), decay, scaling)


def _preconditioner(settings):
    if settings.get("optimizer", "sgd") == "adam":
        return optax.scale_by_adam(settings.get("momentum", 0.9))
    return optax.trace(settings["momentum"]) if "momentum" in settings else optax.identity()


def descend(
    optimizer: optax.GradientTransformation, gradient: Callable, cost: Cost, prepare: Callable | None = None
) -> Procedure:
    """A procedure of one optimizer behind `gradient(params, prepared, batches, count, key)`."""

    def step(params, prepared, state, batches, count, key):
        updates, state = optimizer.update(gradient(params, prepared, batches, count, key), state, params)
        return optax.apply_updates(params, updates), state

    return Procedure(lambda params, prepared: optimizer.init(params), step, cost, prepare)


def retain_gradient(apply: Callable, params: chex.ArrayTree, batch: Batch) -> chex.ArrayTree:
    """The gradient of the cross-entropy on a batch."""
    return jax.grad(lambda p: objectives.cross_entropy(apply(p, batch["images"]), batch["labels"]))(params)
