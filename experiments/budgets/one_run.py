"""Shared by the budget experiments: problems, and one run of one method.

Every method makes the same number of steps on the same batches, with one forward and backward pass over both (the paper
and the released code make one more forward pass over the retain batch), and is measured on the whole sets equally
often. All numbers of a run are arguments of one compiled block of steps, so hundreds of runs compile a few dozen
programs.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

import eupmu_jax as eupmu
from eupmu_jax import metrics, objectives
from eupmu_jax.benchmark import problems
from eupmu_jax.benchmark.problems import RETRAINED_SEED_OFFSET
from eupmu_jax.gradients import batches
from eupmu_jax.gradients.value_and_grad import LOG_OFFSET
from eupmu_jax.training import budget, fitting
from eupmu_jax.training._streams import id_batches
from experiments.budgets.methods import STACKED, Numbers, Program, Tuning, optimizer

BATCHES = {"digits": (16, 144), "fashion_mnist": (64, 576)}
SIZES = {"digits": None, "fashion_mnist": 20_000}
BLOCKS = 5
LOOKS = 2  # Measurements of the whole retain set in a block, for the trace only.
SHADOW_SIZE = 2_000


class Given(NamedTuple):
    """A trained classifier, its forget and retain sets, and the figures of it and of the retrained model.

    `whole` are the images and labels of the forget set and of the retain set.
    """

    classifier: problems.Problem
    apply: Callable
    params: dict
    figures: dict
    retrained: dict
    whole: tuple


def problem(data: str, forget: str, seed: int, cache: Path, model: str = "mlp") -> Given:
    """Loads or trains the original and the retrained model."""
    prepared = problems.make(data, forget, seed, size=SIZES[data], model=model)
    train = functools.partial(problems.train, prepared, cache=cache, on_step=lambda: None)
    original = train(np.arange(len(prepared.dataset.train_labels)), init_seed=seed)
    retrained = train(prepared.split.retain_ids, init_seed=seed + RETRAINED_SEED_OFFSET)
    figures = (evaluate(prepared, model.params) for model in (original, retrained))
    sets = prepared.split.forget_ids, prepared.split.retain_ids
    whole = tuple((prepared.tree["inputs"][ids], prepared.tree["labels"][ids]) for ids in sets)
    return Given(prepared, prepared.functions.apply, original.params, *figures, whole)


def evaluate(prepared: problems.Problem, params: dict) -> dict:
    """UA, RA, TA, MIA and the losses; the attack is trained on at most 2,000 examples of each kind."""
    return problems.evaluate(prepared, params, shadow_size=SHADOW_SIZE, attacks=())


def _log(losses):
    return jnp.log(jnp.maximum(losses, 0) + LOG_OFFSET)


@functools.partial(jax.jit, static_argnames=("program", "apply", "anchored"))
def _steps(program, apply, anchored, numbers, decay, data, params, state, anchor, index):
    """The steps of stretch `index` of the ids."""
    images, labels, *ids = data
    losses_of = batches.shared_forward(
        lambda p, batch: apply(p, batch["images"]),
        [
            lambda logits, batch: rescale(objectives.bounded_ascent(logits, batch["labels"])),
            lambda logits, batch: rescale(objectives.cross_entropy(logits, batch["labels"])),
        ],
    )
    stacked = program.method in STACKED
    rescale = _log if stacked and program.scale == "log" else lambda x: x
    make_step = eupmu.explicit_step if stacked else functools.partial(eupmu.implicit_step, loss_scale=program.scale)
    step = make_step(losses_of, optimizer(program, numbers, decay))
    anchor_params, anchor_levels = anchor

    def body(carry, ids):
        params, state = carry
        pair = tuple({"images": images[part], "labels": labels[part]} for part in ids)
        loss = lambda p: objectives.cross_entropy(apply(p, pair[1]["images"]), pair[1]["labels"])
        level = None
        if anchored:
            level = anchor_levels + loss(params) - loss(anchor_params)
            level = _log(level) if program.scale == "log" else level
        params, state, _ = step(params, state, pair, levels=level)
        return (params, state), None

    (params, state), _ = jax.lax.scan(body, (params, state), tuple(part[index] for part in ids))
    return params, state


@functools.partial(jax.jit, static_argnames="program")
def _init(program, numbers, decay, params):
    return optimizer(program, numbers, decay).init(params)


@functools.cache
def _measure(apply):
    """Measures `(minus the forget loss, (1,) retain loss)` on the whole sets."""

    def measure(whole, params):
        forget, retain = (objectives.cross_entropy(apply(params, images), labels) for images, labels in whole)
        return -forget, retain[None]

    return measure


def run(
    given: Given,
    program: Program,
    setting: Tuning,
    rise: float,
    *,
    epochs: int,
    seed: int,
    decay: Callable[[int], np.ndarray] = lambda steps: 1 - np.arange(steps) / steps,
    retain_ratio: int = 9,
    anchored: bool = False,
    trace: list | None = None,
) -> budget.BudgetRun:
    """Unlearns, with the loss on the whole retain set to rise by at most `rise` nats.

    Args:
      given, program, setting: The problem, the method and its tuned numbers.
      rise: B.
      epochs: Passes over the forget set, rounded up to equal blocks.
      seed: The seed of the batches.
      decay: Factors on the learning rate, one for each step.
      retain_ratio: Retain examples for each forget example in a step.
      anchored: Whether the controller sees the last full measurement plus the change on the batch since then, or else
        the batch's own loss.
      trace: Filled with the loss on the whole retain set at `BLOCKS * LOOKS` points in time, and at the start.
    """
    t, (forget_size, _) = given.classifier, BATCHES[given.classifier.dataset.name]
    sets = t.split.forget_ids, t.split.retain_ids
    stretch = -(-epochs * -(-len(sets[0]) // forget_size) // (BLOCKS * LOOKS))
    steps = stretch * BLOCKS * LOOKS
    rng = np.random.default_rng(seed)
    streams = [
        id_batches(ids, size, rng) for ids, size in zip(sets, (forget_size, retain_ratio * forget_size), strict=True)
    ]
    ids = (np.stack([next(stream) for _ in range(steps)]).reshape(BLOCKS * LOOKS, stretch, -1) for stream in streams)
    data = (t.tree["inputs"], t.tree["labels"], *map(jnp.asarray, ids))

    start = given.figures["retain_loss"]
    low, high = (float(_log(x)) if program.scale == "log" else x for x in (start, start + rise))
    factors = np.asarray(decay(steps), np.float32)
    numbers = Numbers(*setting, low, high, (high - low) / (setting.learning_rate * factors.sum()))
    numbers = jax.tree.map(jnp.float32, numbers)
    if trace is not None:
        trace.append(start)
    state = _init(program, numbers, factors, given.params)
    look = Partial(_measure(given.apply), given.whole)

    def block(params, state, anchor, index):
        for part in range(index * LOOKS, (index + 1) * LOOKS):
            params, state = _steps(program, given.apply, anchored, numbers, factors, data, params, state, anchor, part)
            if trace is not None:
                trace.append(float(_look(look, params)))
        return params, state

    return budget.run_within_limit(
        block,
        Partial(_measure(given.apply), given.whole),
        start + rise,
        given.params,
        state,
        blocks=BLOCKS,
        steps_per_block=stretch * LOOKS,
    )


@jax.jit
def _look(look, params):
    return look(params)[1][0]


def accuracies(given: Given, params: dict) -> dict:
    """UA and RA only, as the attack behind MIA takes longer than the run."""
    predict = lambda images: fitting.predict(given.apply, params, images)
    forget, retain = (metrics.accuracy(predict(images), np.asarray(labels)) for images, labels in given.whole)
    return {"UA": 100 - forget, "RA": retain}
