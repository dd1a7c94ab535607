"""Runs one unlearning method on a classifier, and watches it."""

import time
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from eupmu_jax.methods import METHODS, Settings, cosine, loss_of
from eupmu_jax.objectives import cross_entropy, random_labels
from eupmu_jax.runtime.task import Task
from eupmu_jax.runtime.training import id_batches, predict

PROBE_SIZE = 2_000


class Plan(NamedTuple):
    """Size of a run, the same for every method.

    Attributes:
      epochs: Passes over the forget set.
      forget_batch, retain_batch: Examples in each step.
      probes: Points in time at which losses and cosine are measured, besides the start.
    """

    epochs: int
    forget_batch: int
    retain_batch: int
    probes: int = 20

    def steps(self, num_forget: int) -> int:
        """Optimizer steps for a forget set of that size."""
        return self.epochs * -(-num_forget // min(self.forget_batch, num_forget))


class Run(NamedTuple):
    """An unlearned model and how it came about.

    Attributes:
      params: After the last step.
      seconds: Time of the steps alone, without compilation and probes.
      compile_seconds: Time to compile the step.
      forward, backward: Examples passed through the model, in all.
      history: Dict of equally long lists: `step`, `retain_loss`, `forget_loss` (plain cross-entropies on at most 2,000
        examples), `multiplier` (NaN without one) and `cosine` between the gradients of the two objectives.
    """

    params: chex.ArrayTree
    seconds: float
    compile_seconds: float
    forward: int
    backward: int
    history: dict[str, list[float]]


def run_method(
    method: str,
    settings: Settings,
    plan: Plan,
    task: Task,
    params: chex.ArrayTree,
    *,
    seed: int,
    on_step: Callable[[], None] = lambda: None,
) -> Run:
    """Unlearns the forget set of `task` from a classifier.

    Args:
      method: A key of `METHODS`.
      settings, plan: The method's tuning and the run's size.
      task: The data, the split and the model's `apply`. Random labels are redrawn in every epoch.
      params: Of the original model; left as they are.
      seed: Seed of batches, labels and probes.
      on_step: Called after each step, for a progress bar.

    Returns:
      The run. Parameters that a step made non-finite are not hidden: the caller sees them in the losses.
    """
    apply, images, labels = task.apply, task.images, task.labels
    forget_ids, retain_ids = task.split.forget_ids, task.split.retain_ids
    steps = plan.steps(len(forget_ids))
    sizes = min(plan.forget_batch, len(forget_ids)), min(plan.retain_batch, len(retain_ids))
    retain_logits = predict(apply, params, images[retain_ids])
    retain_loss = float(cross_entropy(jnp.asarray(retain_logits), labels[retain_ids]))
    procedure = METHODS[method](apply, settings, steps, retain_loss)
    rng = np.random.default_rng(seed)
    streams = [id_batches(ids, size, rng) for ids, size in zip((forget_ids, retain_ids), sizes, strict=True)]
    label_key = jax.random.key(seed)

    def batch(arrays, ids):
        return {name: array[ids] for name, array in arrays.items()}

    def step(params, state, arrays, ids):
        return procedure.step(params, state, tuple(batch(arrays, part) for part in ids))

    loss = loss_of(apply, settings.forget_objective)

    @jax.jit
    def probe(params, arrays, ids):
        batches = tuple(batch(arrays, part) for part in ids)
        forget_loss, retain_loss = (cross_entropy(apply(params, b["images"]), b["labels"]) for b in batches)
        return {"forget_loss": forget_loss, "retain_loss": retain_loss, "cosine": cosine(loss, params, batches)}

    probe_ids = tuple(rng.permutation(ids)[:PROBE_SIZE] for ids in (forget_ids, retain_ids))
    history: dict[str, list[float]] = {"step": [], "forget_loss": [], "retain_loss": [], "cosine": [], "multiplier": []}

    def record(count):
        measured = probe(params, arrays, probe_ids) | {"step": count, "multiplier": _multiplier(state)}
        for name, value in measured.items():
            history[name].append(float(value))

    @jax.jit
    def draw_labels(epoch):
        return random_labels(jax.random.fold_in(label_key, epoch), labels, task.dataset.num_classes)

    arrays = {"images": images, "labels": labels, "random_labels": draw_labels(0)}
    params = jax.tree.map(jnp.array, params)
    state = procedure.init(params)
    ids = tuple(next(stream) for stream in streams)
    start = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, arrays, ids).compile()
    compile_seconds = time.perf_counter() - start

    record(0)
    seconds, checkpoint_steps = 0.0, set(np.linspace(0, steps, plan.probes + 1).round().astype(int))
    start = time.perf_counter()
    for count in range(1, steps + 1):
        if count > 1:
            ids = tuple(next(stream) for stream in streams)
            if (count - 1) % (steps // plan.epochs) == 0:
                arrays["random_labels"] = draw_labels((count - 1) // (steps // plan.epochs))
        params, state = compiled(params, state, arrays, ids)
        on_step()
        if count in checkpoint_steps:
            jax.block_until_ready(params)
            seconds += time.perf_counter() - start
            record(count)
            start = time.perf_counter()
    examples = lambda passes: steps * (passes[0] * sizes[0] + passes[1] * sizes[1])
    return Run(params, seconds, compile_seconds, examples(procedure.forward), examples(procedure.backward), history)


def _multiplier(state):
    values = optax.tree_utils.tree_get(state, "multipliers")
    return np.nan if values is None else values[0]
