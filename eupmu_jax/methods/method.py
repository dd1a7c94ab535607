"""What every unlearning method is made of: a task, the terms of a run, settings, and a step over two batches.

"Descent" in the docstrings of methods means `descent`: Adam, Muon or SGD, clipped, its learning rate falling to 0.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import chex
import jax
import optax

from eupmu_jax.gradients.batches import SharedForward, shared_forward
from eupmu_jax.surgery.default_optimizer import muon_direction, wide_enough
from eupmu_jax.tasks import Task

# The same for every method, so that it favours none.
MAX_NORM = 1.0

# Numbers may be traced, so that runs with different numbers share compiled code; strings choose the code.
Settings = Mapping[str, "chex.Numeric | str"]


class LogUniform(NamedTuple):
    """A positive setting, searched on a logarithmic scale."""

    low: float
    high: float


def middle_of(dimension: LogUniform) -> float:
    """The geometric mean of its ends, to three digits."""
    return float(f"{(dimension.low * dimension.high) ** 0.5:.3g}")


class Choice(NamedTuple):
    """A setting with few values."""

    options: tuple


# Searched for every method that leaves the forget objective open, and the learning rates searched for Adam.
FORGET_OBJECTIVE = Choice(("random_labels", "bounded_ascent", "kl_to_uniform"))
LEARNING_RATE = LogUniform(3e-4, 1e-2)
MOMENTUM = Choice((0.0, 0.9))
# Settings whose values are names of forget losses.
OBJECTIVES = ("forget_objective", "ascent_objective")
# The `ascent_objective` of a run that sets none.
ASCENT = "gradient_ascent"
# Read by `descent`, so by every method that steps with it.
OPTIMIZER_SETTINGS = ("optimizer", "momentum", "weight_decay")
OPTIMIZERS = ("adam", "muon", "sgd")


class Terms(NamedTuple):
    """The terms of a run, as far as a method may know them.

    Attributes:
      num_forget, num_retain: Examples in the two sets.
      steps: Optimizer steps of the run.
      retain_loss: The original model's mean loss over the whole retain set.
      passes: Forward passes of single examples that the run may make in all; a backward pass counts as two.
      retain_error: The original model's mean error over the whole retain set, or its loss if the task has no error.
      retain_batch: Examples of the retain set in each step.
      forget_error: As `retain_error`, for the forget set; known to methods that steer an error that is not a rate.
      at_least: Whether the forget error may exceed its target, as when a condition is to be forgotten entirely.
      rounds: Steps of the rounds of a run without a fixed number of steps, each twice as long as the one before; None
        for a run of one round.
    """

    num_forget: int
    num_retain: int
    steps: int
    retain_loss: chex.Numeric
    passes: float = math.inf
    retain_error: chex.Numeric = 0.0
    retain_batch: int = 1
    forget_error: chex.Numeric = 0.0
    at_least: bool = False
    rounds: tuple[int, ...] | None = None


class Cost(NamedTuple):
    """Passes through the model.

    Attributes:
      forward, backward: Passes of each example of the `(forget, retain)` batch, in each step.
      outside_forward, outside_backward: Examples passed before the first and after the last step, in all.
    """

    forward: tuple[float, float]
    backward: tuple[float, float]
    outside_forward: int = 0
    outside_backward: int = 0


class Procedure(NamedTuple):
    """A method prepared to run on one task.

    Attributes:
      init: `(params, prepared) -> state`; it shares no array with its arguments.
      step: `(params, prepared, state, (forget_batch, retain_batch), count, key) -> (params, state)`, to be jitted;
        `count` is the number of steps taken before.
      cost: Passes through the model.
      prepare: `(params, forget, retain, key) -> prepared`, called once before the first step with whole sets (see
        `tasks.Examples`); None if there is nothing to prepare, and `prepared` is then ().
      finish: `(params, state, prepared, forget, retain) -> (params, share)`, called once after the last step, or None.
        `share` is how much of the path from the original parameters to those of the last step was kept, 1 for all of
        it.
      outside: What `prepare` and `finish` do with more than a step's batches at once, for estimates of memory: a pair
        `(function, examples)` for each, with `function(params, batch)`.
    """

    init: Callable
    step: Callable
    cost: Cost
    prepare: Callable | None = None
    finish: Callable | None = None
    outside: tuple[tuple[Callable, int], ...] = ()


class Method(NamedTuple):
    """A row of the table of methods.

    Attributes:
      make: `(task, terms, settings) -> Procedure`. Called with plain numbers for all but `step`, and again inside `jit`
        for `step`: there the numbers of `settings` and the losses and errors of `terms` are traced, so no Python
        condition in `make` itself may depend on them.
      paper: Where it was published.
      passes: Forward and backward passes of a step and what else it costs, in words; not the original model's figures
        on the whole retain set, which `unlearn` measures for every method, or takes as `start`.
      needs: What it reads besides the original model.
      space: Settings that are searched, and their ranges: three for every method, one of them `learning_rate`, whose
        range spans one and a half powers of ten.
      requires: Optional functions of a task that it needs.
      forget: Names of forget losses that it needs.
      optional: Settings that it reads in addition to those of `space` and of the optimizer.
      optimizer_settings: Settings of the optimizer that it reads; others give a warning and have no effect.
      family: "EUPMU", "aggregators" or "other methods".
      version: Raised by hand with every change that affects results.
      slope: Whether it reads the gradient of the retain loss at the original model, over the forget set.
      transports: Whether each forgotten example has a target score, which is taken from held-out data. Each step then
        gets as `prepared` the pair of what was prepared and the targets `(n,)` of its forget batch.
    """

    make: Callable[[Task, Terms, Settings], Procedure]
    paper: str
    passes: str
    needs: str
    space: dict[str, LogUniform | Choice]
    requires: tuple[str, ...] = ()
    forget: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    optimizer_settings: tuple[str, ...] = OPTIMIZER_SETTINGS
    family: str = "other methods"
    version: int = 1
    slope: bool = False
    transports: bool = False

    @property
    def steers(self) -> bool:
        """Whether it brings the forget error to a target, which it takes from held-out data."""
        return self.transports or "target" in self.optional

    def losses(self, task: Task, settings: Settings) -> list[str]:
        """Names of a task's forget losses that it uses with these settings."""
        default = {"ascent_objective": ASCENT} if "ascent_objective" in self.space else {}
        chosen = {**default, **settings}
        named = {str(chosen[name]) for name in OBJECTIVES if name in chosen}
        return sorted({*self.forget, *named} & set(task.forget))


def loss_of(task: Task, forget_objective: str) -> SharedForward:
    """Forget and retain losses of a task, `(params, batch, key)`, sharing its forward pass.

    Raises:
      ValueError: For a forget loss that the task lacks.

    >>> import jax.numpy as jnp
    >>> from eupmu_jax import tasks
    >>> outputs, losses = loss_of(tasks.classification(lambda p, x: x @ p, 2), "kl_to_uniform")
    >>> batch = {"inputs": jnp.eye(2), "labels": jnp.arange(2)}
    >>> [round(float(loss(outputs(jnp.zeros((2, 2)), batch, None), batch)), 4) for loss in losses]
    [0.0, 0.6931]
    """
    if forget_objective not in task.forget:
        raise ValueError(f"forget_objective: got {forget_objective!r}, expected one of {', '.join(task.forget)}")
    return shared_forward(task.outputs, [task.forget[forget_objective], task.retain])


class _Complete(dict):
    """Settings that name a missing one in an error."""

    def __missing__(self, name):
        raise ValueError(f"settings: got {dict(self)}, expected {name!r} too")


def complete(settings: Settings) -> Settings:
    """The settings, with an error that names what is missing in place of a `KeyError`.

    >>> complete({"learning_rate": 0.1})["momentum"]
    Traceback (most recent call last):
    ValueError: settings: got {'learning_rate': 0.1}, expected 'momentum' too
    """
    return _Complete(settings)


def learning_rate(terms: Terms, settings: Settings) -> optax.Schedule:
    """The schedule that falls linearly from the peak `settings["learning_rate"]` to 0 over the run."""
    return optax.linear_schedule(settings["learning_rate"], 0.0, terms.steps)


def descent(terms: Terms, settings: Settings) -> optax.GradientTransformation:
    """The optimizer of every method: clipping to norm 1, Adam, Muon or SGD, a learning rate that falls to 0.

    Settings: `optimizer` is "adam", "muon" or "sgd" (Adam by default), `momentum` that of Adam's first moment, of Muon
    or of SGD (by default 0.9, 0.95 and 0), `weight_decay` a decoupled decay. Muon takes matrices as
    `default_optimizer` does, and Adam the rest.
    """
    decay = optax.add_decayed_weights(settings["weight_decay"]) if "weight_decay" in settings else optax.identity()
    scaling = optax.scale_by_learning_rate(learning_rate(terms, settings))
    return wide_enough(optax.chain(optax.clip_by_global_norm(MAX_NORM), _preconditioner(settings), decay, scaling))


def _preconditioner(settings):
    optimizer = settings.get("optimizer", "adam")
    if optimizer == "adam":
        return optax.scale_by_adam(settings.get("momentum", 0.9))
    if optimizer == "muon":
        return muon_direction(settings.get("momentum", 0.95))
    if optimizer != "sgd":
        raise ValueError(f"settings['optimizer']: got {optimizer!r}, expected one of {', '.join(OPTIMIZERS)}")
    return optax.trace(settings["momentum"]) if "momentum" in settings else optax.identity()


def descend(
    optimizer: optax.GradientTransformation, gradient: Callable, cost: Cost, prepare: Callable | None = None
) -> Procedure:
    """A procedure that applies one optimizer to `gradient(params, prepared, batches, count, key)`.

    It takes every step, even if the gradient is not finite, which `skip_nonfinite` refuses in methods with a surgery,
    an aggregator or a multiplier.
    """

    def step(params, prepared, state, batches, count, key):
        updates, state = optimizer.update(gradient(params, prepared, batches, count, key), state, params)
        return optax.apply_updates(params, updates), state

    return Procedure(lambda params, prepared: optimizer.init(params), step, cost, prepare)


def keep_original(params: chex.ArrayTree, forget: chex.ArrayTree, retain: chex.ArrayTree, key) -> chex.ArrayTree:
    """The `Procedure.prepare` of a method that only needs to keep the original parameters."""
    return params


def retain_gradient(task: Task, params: chex.ArrayTree, batch: chex.ArrayTree, key=None) -> chex.ArrayTree:
    """The gradient of the retain loss on a batch."""
    return jax.grad(lambda p: task.retain(task.outputs(p, batch, key), batch))(params)


def size_of(batch: chex.ArrayTree) -> int:
    """Number of examples in a batch."""
    return jax.tree.leaves(batch)[0].shape[0]


def softened(
    task: Task, outputs: chex.ArrayTree, teacher: chex.ArrayTree, batch: chex.ArrayTree, temperature: chex.Numeric
) -> chex.Array:
    r"""The task's divergence at a temperature, :math:`T^2 D(s / T, t / T)`; the teacher is fixed."""
    scale = lambda tree: jax.tree.map(lambda leaf: leaf / temperature, tree)
    assert task.divergence is not None  # required by the methods that call this
    both = scale(outputs), scale(jax.lax.stop_gradient(teacher))
    parameters = inspect.signature(task.divergence).parameters.values()
    needed = [p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return temperature**2 * task.divergence(*both, *((batch,) if len(needed) > len(both) else ()))
