"""Runs one unlearning method on a classifier, and watches it."""

import bisect
import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from eupmu_jax import data, methods
from eupmu_jax._stack.algebra import gram_matrix
from eupmu_jax.benchmark.problems import Task
from eupmu_jax.gradients.batches import SharedForward
from eupmu_jax.gradients.value_and_grad import stacked_value_and_grad
from eupmu_jax.objectives import cross_entropy, random_labels
from eupmu_jax.training.fitting import Seconds, id_batches, predict

PROBE_SIZE = 2_000


class Plan(NamedTuple):
    """Size of a run, the same for every method.

    Attributes:
      steps: Optimizer steps.
      forget_batch, retain_batch: Examples in each step; whole sets, if these are smaller.
      probes: Points in time at which losses and cosine are measured, besides the start.
    """

    steps: int
    forget_batch: int
    retain_batch: int
    probes: int = 20

    @classmethod
    def of_epochs(cls, epochs: int, forget_batch: int, retain_batch: int, *, num_forget: int, probes: int = 20):
        """A plan of whole passes over a forget set of `num_forget` examples."""
        steps = epochs * -(-num_forget // min(forget_batch, num_forget))
        return cls(steps, forget_batch, retain_batch, probes)


def affordable_steps(method: str, settings: methods.Settings, plan: Plan, task: Task) -> int:
    """Steps of a method that pass no more examples than `plan.steps` plain ones, and at most as many.

    A plain step passes both batches once forward and once backward. A backward pass counts as two forward passes;
    passes before the first and after the last step count too.

    Raises:
      ValueError: For an unknown method, settings that it lacks, or a plan that does not pay for one step.
    """
    problem, sizes = _problem(task, plan)

    def passes(steps):
        cost = methods.method(method).make(problem._replace(steps=steps), settings).cost
        batches = zip(cost.forward, cost.backward, sizes, strict=True)
        each = sum((forward + 2 * backward) * size for forward, backward, size in batches)
        return steps * each + cost.outside_forward + 2 * cost.outside_backward

    steps = bisect.bisect_right(range(1, plan.steps + 1), problem.passes, key=passes)
    if not steps:
        raise ValueError(
            f"plan: got {plan.steps} steps of {sizes[0]} + {sizes[1]} examples, which are {problem.passes} passes, "
            f"expected at least {passes(1):g}, which {method} makes with a single step"
        )
    return steps


class Run(NamedTuple):
    """An unlearned model and how it came about.

    Attributes:
      params: After the last step, and after what the method does then.
      seconds: Time of preparation, steps and end, without compilation and probes, on the clock.
      processor_seconds: The same of the processor: other work on the machine does not lengthen it.
      compile_seconds: Time to compile the step.
      forward, backward: Examples passed through the model, in all.
      history: Dict of equally long lists: `step`, `retain_loss`, `forget_loss` (plain cross-entropies on at most 2,000
        examples), `multiplier` (NaN without one) and `cosine` between the gradients of the two objectives.
    """

    params: chex.ArrayTree
    seconds: float
    processor_seconds: float
    compile_seconds: float
    forward: int
    backward: int
    history: dict[str, list[float]]


def run_method(
    method: str,
    settings: methods.Settings,
    plan: Plan,
    task: Task,
    params: chex.ArrayTree,
    *,
    seed: int,
    retain_loss: float | None = None,
    warm: bool = False,
    on_step: Callable[[], None] = lambda: None,
) -> Run:
    """Unlearns the forget set of `task` from a classifier.

    Args:
      method: A key of `methods.METHODS`.
      settings, plan: The method's tuning and the run's size. Runs that differ in numbers alone share compiled code.
      task: The data, the split and the model's `apply`. Random labels are redrawn in every pass over the forget set.
      params: Of the original model; left as they are.
      seed: Seed of batches, labels and probes.
      retain_loss: Of the original model over the whole retain set, if it is known; it is measured otherwise.
      warm: Whether to prepare and finish once beforehand, so that `seconds` holds no compilation of theirs either.
      on_step: Called after each step, for a progress bar.

    Returns:
      The run. Parameters that a step made non-finite are not hidden: the caller sees them in the losses.

    Raises:
      ValueError: For an unknown method, settings that it lacks, or a plan that does not pay for its preparation.
    """
    images, labels = task.images, task.labels
    forget_ids, retain_ids = task.split.forget_ids, task.split.retain_ids
    problem, sizes = _problem(task, plan)
    if retain_loss is None:
        retain_logits = predict(task.apply, params, images[retain_ids])
        retain_loss = float(cross_entropy(jnp.asarray(retain_logits), labels[retain_ids]))
    numbers = {name: jnp.float32(value) for name, value in settings.items() if not isinstance(value, str)}
    choices = tuple(sorted((name, value) for name, value in settings.items() if isinstance(value, str)))
    make = methods.method(method).make
    procedure = make(problem._replace(retain_loss=retain_loss), settings)
    step = _jitted_step(make, problem, choices, task.augment)

    rng = np.random.default_rng(seed)
    streams = [id_batches(ids, size, rng) for ids, size in zip((forget_ids, retain_ids), sizes, strict=True)]
    label_key, step_key, prepare_key = jax.random.key(seed), jax.random.key(seed + 1), jax.random.key(seed + 2)
    probe_ids = tuple(rng.permutation(ids)[:PROBE_SIZE] for ids in (forget_ids, retain_ids))
    history: dict[str, list[float]] = {"step": [], "forget_loss": [], "retain_loss": [], "cosine": [], "multiplier": []}

    def record(count):
        objective = settings.get("forget_objective", "random_labels")
        measured = _probe(task.apply, objective, params, arrays, probe_ids)
        measured |= {"step": count, "multiplier": _multiplier(state)}
        for name, value in measured.items():
            history[name].append(float(value))

    def draw_labels(epoch):
        return random_labels(jax.random.fold_in(label_key, epoch), labels, task.dataset.num_classes)

    def take(params, state, count):
        return step(params, state, prepared, numbers, retain_loss, arrays, ids, np.int32(count), step_key)

    whole = lambda: [{"images": images[ids], "labels": labels[ids]} for ids in (forget_ids, retain_ids)]
    sets = whole() if procedure.prepare or procedure.finish else ()
    prepare = functools.partial(procedure.prepare or _nothing, params, *sets, prepare_key)
    arrays = {"images": images, "labels": labels, "random_labels": draw_labels(0)}
    if warm:
        prepared = jax.block_until_ready(prepare())
        if procedure.finish:
            jax.block_until_ready(procedure.finish(params, prepared, *sets))
    spans, start = [], Seconds.now()
    prepared = jax.block_until_ready(prepare())
    spans.append(Seconds.now().since(start))
    params = jax.tree.map(jnp.array, params)  # the step donates its arguments; the caller keeps the original ones
    state = procedure.init(params, prepared)
    ids = tuple(next(stream) for stream in streams)
    compiling = time.perf_counter()
    copies = jax.tree.map(jnp.array, (params, state))
    jax.block_until_ready(take(copies[0], copies[1], 0))
    compile_seconds = time.perf_counter() - compiling

    if plan.probes:
        record(0)
    probe_steps = set(np.linspace(0, plan.steps, plan.probes + 1).round().astype(int)) if plan.probes else set()
    steps_per_epoch = -(-len(forget_ids) // sizes[0])
    start = Seconds.now()
    for count in range(plan.steps):
        if count:
            ids = tuple(next(stream) for stream in streams)
            if count % steps_per_epoch == 0:
                arrays["random_labels"] = draw_labels(count // steps_per_epoch)
        params, state = take(params, state, count)
        on_step()
        if count + 1 in probe_steps:
            jax.block_until_ready(params)
            spans.append(Seconds.now().since(start))
            record(count + 1)
            start = Seconds.now()
    if procedure.finish:
        params = procedure.finish(params, prepared, *sets)
    jax.block_until_ready(params)
    spans.append(Seconds.now().since(start))
    seconds = Seconds(*map(sum, zip(*spans, strict=True)))
    cost = procedure.cost
    total = lambda passes, outside: round(plan.steps * (passes[0] * sizes[0] + passes[1] * sizes[1]) + outside)
    forward, backward = total(cost.forward, cost.outside_forward), total(cost.backward, cost.outside_backward)
    return Run(params, *seconds, compile_seconds, forward, backward, history)


def _problem(task, plan):
    """The problem without its retain loss, and the sizes of the batches."""
    counts = len(task.split.forget_ids), len(task.split.retain_ids)
    sizes = min(plan.forget_batch, counts[0]), min(plan.retain_batch, counts[1])
    passes = 3 * plan.steps * sum(sizes)
    known = task.apply, task.fresh_params, task.dataset.num_classes, *counts
    problem = methods.Problem(*known, plan.steps, retain_loss=0.0, passes=passes)
    return problem, sizes


def _nothing(*_):
    return ()


@functools.lru_cache(maxsize=64)
def _jitted_step(make, problem, choices, augment):
    """The compiled step of a method, for any numbers."""

    def step(params, state, prepared, numbers, retain_loss, arrays, ids, count, key):
        procedure = make(problem._replace(retain_loss=retain_loss), dict(choices) | numbers)
        step_key = jax.random.fold_in(key, count)
        batches = tuple(jax.tree.map(lambda array: array[part], arrays) for part in ids)  # noqa: B023
        if augment:
            keys = jax.random.split(jax.random.fold_in(step_key, 1))
            batches = tuple(b | {"images": data.augment(k, b["images"])} for k, b in zip(keys, batches, strict=True))
        return procedure.step(params, prepared, state, batches, count, step_key)

    return jax.jit(step, donate_argnums=(0, 1))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _probe(apply, forget_objective, params, arrays, ids):
    batches = tuple({name: array[part] for name, array in arrays.items()} for part in ids)
    forget_loss, retain_loss = (cross_entropy(apply(params, b["images"]), b["labels"]) for b in batches)
    measured = cosine(methods.loss_of(apply, forget_objective), params, batches)
    return {"forget_loss": forget_loss, "retain_loss": retain_loss, "cosine": measured}


def cosine(loss: SharedForward, params: chex.ArrayTree, batches) -> chex.Array:
    """Cosine between the forget and the retain gradient on `batches`; 0 if either is zero."""
    gram = gram_matrix(stacked_value_and_grad(loss)(params, batches)[1])
    norms = jnp.sqrt(gram[0, 0] * gram[1, 1])
    return jnp.where(norms > 0, gram[0, 1] / jnp.where(norms > 0, norms, 1), 0.0)


def _multiplier(state):
    values = optax.tree_utils.tree_get(state, "multipliers")
    return np.nan if values is None else values[0]
