"""One limit for the average, one for each class, or an ordered weighted average: which class pays for forgetting?

Command:  uv run python experiments/per_class/run.py
Time:     about 15 minutes on one core; finished rows are not repeated.
Result:   experiments/per_class/rows.jsonl, one row for each method, strength and seed.

Fashion-MNIST, an MLP on 20,000 images, 10 % forgotten at random, Muon. Every retain batch holds equally many examples
of each class. "one" keeps the mean loss below start + B, "ten" each class's loss below its own start + B, with the
barrier (explicit surgery) or with PI (implicit surgery with the numbers that `experiments/robustness` uses). "owa" is a
Gini-weighted average of the classes' losses with a fixed weight, "mean" the plain average with a fixed weight. Methods
are to be compared at equal UA, so each runs at several strengths: B for those with a limit, weights for the others.
"""

import argparse
import functools
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

import eupmu_jax as eupmu
from eupmu_jax import aggregators, controllers, metrics, objectives, tolerances
from eupmu_jax.benchmark import rows
from eupmu_jax.gradients import batches
from eupmu_jax.training import budget, fitting
from eupmu_jax.training._streams import id_batches
from experiments import origin
from experiments.budgets import one_run
from experiments.budgets.methods import OPTIMIZERS
from experiments.budgets.run import SCHEDULES
from experiments.robustness.run import tuned

ROWS = Path(__file__).with_name("rows.jsonl")

CLASSES = 10
OPTIMIZER, LEARNING_RATE = "muon", 0.02
EPOCHS = 5
LIMITS, WEIGHTS = (0.005, 0.01, 0.02, 0.04, 0.08), (1.0, 2.0, 4.0, 8.0)
STRENGTHS = {
    "barrier, one": LIMITS,
    "barrier, ten": LIMITS,
    "PI, one": LIMITS,
    "PI, ten": LIMITS,
    "owa": WEIGHTS,
    "mean": WEIGHTS,
}


def limit_of(method, strength, start):
    """`(1,)` or `(classes,)`; infinite where there is none. `start` are the classes' losses before unlearning."""
    if method not in ("owa", "mean"):
        return (start.mean()[None] if "one" in method else start) + strength
    return jnp.full(1, jnp.inf)


def optimizer_of(method, strength, start, decay):
    schedule = lambda count: LEARNING_RATE * decay[jnp.minimum(count, len(decay) - 1)]
    base = OPTIMIZERS[OPTIMIZER](schedule)
    limit = limit_of(method, strength, start)
    _, numbers = tuned("PI" if "PI" in method else "barrier")
    if "PI" in method:
        gain = numbers["gain"] / strength / len(limit)
        controller = controllers.nu_pi(gain, 0.1 * gain)
        first = jnp.full(len(limit), numbers["multiplier"] / len(limit))
        surgery = eupmu.implicit_surgery(
            tolerances.budget(limit, 1.0), controller, proxy="level", initial_multiplier=first
        )
        return eupmu.skip_nonfinite(optax.chain(base, surgery))
    if "barrier" in method:
        first = eupmu.unilateral_surgery(tolerances.budget(limit, 30 * numbers["gain"] / LEARNING_RATE))
    else:
        ranks = jnp.arange(CLASSES)
        by_rank = (2 * (CLASSES - ranks) - 1) / CLASSES**2 if method == "owa" else jnp.full(CLASSES, 1 / CLASSES)
        first = aggregators.owa(strength * by_rank, forget_weight=1.0)
    return eupmu.skip_nonfinite(optax.chain(first, base))


@functools.partial(jax.jit, static_argnames=("method", "apply"))
def steps(method, apply, strength, start, decay, data, params, state, index):
    """The steps of block number `index` of the ids: `(blocks, n, F)` and `(blocks, n, classes, R)`."""
    images, labels, forget_ids, retain_ids = data
    retain_head = lambda logits, batch: objectives.cross_entropy(logits, batch["labels"])
    heads = [lambda logits, batch: objectives.bounded_ascent(logits, batch["labels"])]
    heads += [retain_head] * (1 if "one" in method else CLASSES)
    loss = batches.shared_forward(lambda p, batch: apply(p, batch["images"]), heads)
    make_step = eupmu.implicit_step if "PI" in method else eupmu.explicit_step
    step = make_step(loss, optimizer_of(method, strength, start, decay))

    def body(carry, ids):
        forget, retain = ids
        groups = [retain.reshape(-1)] if "one" in method else list(retain)
        batch = tuple({"images": images[part], "labels": labels[part]} for part in (forget, *groups))
        return step(*carry, batch)[:2], None

    return jax.lax.scan(body, (params, state), (forget_ids[index], retain_ids[index]))[0]


@functools.cache
def losses_of(apply, average):
    """`(minus the forget loss, the classes' losses or their mean as a (1,) array)`, on the whole sets."""

    def measure(whole, params):
        forget, retain = (
            optax.softmax_cross_entropy_with_integer_labels(apply(params, images), labels) for images, labels in whole
        )
        members = jax.nn.one_hot(whole[1][1], CLASSES)
        by_class = retain @ members / members.sum(axis=0)
        return -forget.mean(), retain.mean()[None] if average else by_class

    return measure


def unlearn(given, method, strength) -> dict:
    """One run, as the fields of a row."""
    task = given.classifier
    images, labels, seed = task.tree["inputs"], np.asarray(task.tree["labels"]), task.seed
    apply = given.apply
    by_class = [task.split.retain_ids[labels[task.split.retain_ids] == c] for c in range(CLASSES)]
    forget_size, retain_size = one_run.BATCHES["fashion_mnist"]
    block = -(-EPOCHS * -(-len(task.split.forget_ids) // forget_size) // one_run.BLOCKS)
    rng = np.random.default_rng(seed)

    def draw(ids, size):
        stream = id_batches(ids, size, rng)
        return np.stack([next(stream) for _ in range(one_run.BLOCKS * block)]).reshape(one_run.BLOCKS, block, size)

    ids = (
        draw(task.split.forget_ids, forget_size),
        np.stack([draw(i, retain_size // CLASSES) for i in by_class], axis=2),
    )
    data = (images, task.tree["labels"], *map(jnp.asarray, ids))
    measure = lambda average: Partial(losses_of(apply, average), given.whole)
    start = jax.jit(measure(False))(given.params)[1]
    decay = jnp.asarray(SCHEDULES["linear"](one_run.BLOCKS * block), jnp.float32)
    strength = jnp.float32(strength)
    result = budget.run_within_limit(
        lambda params, state, _, index: steps(method, apply, strength, start, decay, data, params, state, index),
        measure("ten" not in method),
        limit_of(method, strength, start),
        given.params,
        optimizer_of(method, strength, start, decay).init(given.params),
        blocks=one_run.BLOCKS,
        steps_per_block=block,
    )
    # Fixed weights have no limit, so their last parameters count.
    params = result.last if method in ("owa", "mean") else result.best.params
    damage = jax.jit(measure(False))(params)[1] - start
    accuracy = [metrics.accuracy(fitting.predict(apply, params, images[i]), labels[i]) for i in by_class]
    before = [metrics.accuracy(fitting.predict(apply, given.params, images[i]), labels[i]) for i in by_class]
    return {
        "data": task.dataset.name,
        "optimizer": OPTIMIZER,
        "learning_rate": LEARNING_RATE,
        "epochs": EPOCHS,
        **one_run.accuracies(given, params),
        "rises": np.asarray(damage, float).tolist(),
        "drops": (np.array(before) - accuracy).tolist(),
        "infeasible": bool(result.best.infeasible),
        "full_passes": result.full_passes,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--cache", type=Path, default=Path("eupmu_runs/models"))
    arguments = parser.parse_args()
    made_by = origin.of(__file__)
    for seed in arguments.seeds:
        given = one_run.problem("fashion_mnist", "random:10%", seed, arguments.cache)
        for method, strength in itertools.chain(*([(m, s) for s in values] for m, values in STRENGTHS.items())):
            key = {"method": method, "strength": strength, "seed": seed}
            rows.add(ROWS, key, functools.partial(unlearn, given, method, strength), made_by)


if __name__ == "__main__":
    main()
