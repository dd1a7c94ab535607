"""A row of every method on a problem of seconds, which catches code changes that alter figures.

Command:  uv run python experiments/every_method/run.py
Time:     a minute on one core; rows of the current version of their method are not repeated.
Result:   experiments/every_method/rows.jsonl, one row for each method.

Logistic regression on scikit-learn's digits, every other example of a class forgotten, the default settings of
`eupmu.unlearn`, and a few steps. Training is full-batch descent on a convex loss, so every processor finds the same
model up to rounding. The figures support no claims; `tests/experiments/test_every_method.py` reproduces them.
"""

import argparse
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import eupmu_jax as eupmu
from eupmu_jax.benchmark import rows
from eupmu_jax.methods import METHODS, default_settings
from experiments import origin

ROWS = Path(__file__).with_name("rows.jsonl")
COMMAND = origin.command(__file__)
FORGOTTEN = 3
EPOCHS, LEARNING_RATE, DECAY = 300, 1.0, 1e-3
STEPS, FORGET_BATCH, RETAIN_BATCH = 10, 16, 48
# SCRUB's first gradient is that of a divergence from itself, zero up to rounding, which Adam would blow up.
OTHER_SETTINGS = {"SCRUB": {"optimizer": "sgd", "learning_rate": 0.3}}
# What is compared when a row is reproduced.
FIGURES = ("forget_loss", "retain_loss", "change")


def apply(params, inputs):
    return inputs @ params["weights"] + params["bias"]


def zeros(key):
    return {"weights": jnp.zeros((64, 10)), "bias": jnp.zeros(10)}


def fresh(key):
    return jax.tree.map(lambda leaf: leaf + jax.random.normal(key, leaf.shape) / 8, zeros(key))


TASK = eupmu.tasks.classification(apply, num_classes=10, fresh_params=fresh)


@functools.cache
def problem():
    """The original parameters, the forget set, and the retain set."""
    pixels, labels = load_digits(return_X_y=True)
    whole = {"inputs": jnp.asarray(pixels / 16, jnp.float32), "labels": jnp.asarray(labels, jnp.int32)}
    # Every other example of the class, so that forgetting conflicts with retaining.
    forget_ids = np.flatnonzero(labels == FORGOTTEN)[::2]
    retain_ids = np.setdiff1d(np.arange(len(labels)), forget_ids)
    at = lambda ids: {name: array[ids] for name, array in whole.items()}

    @jax.jit
    def train(params):
        objective = lambda p: retain_loss(p, whole) + DECAY * optax.tree.norm(p, squared=True)
        step = lambda p, _: (jax.tree.map(lambda a, b: a - LEARNING_RATE * b, p, jax.grad(objective)(p)), None)
        return jax.lax.scan(step, params, length=EPOCHS)[0]

    return train(zeros(None)), at(forget_ids), at(retain_ids)


@jax.jit
def retain_loss(params, examples):
    """The task's utility loss on a whole set."""
    return TASK.retain(TASK.outputs(params, examples, None), examples)


@jax.jit
def retain_error(params, examples):
    """The error rate on a whole set."""
    return jnp.mean(TASK.error(TASK.outputs(params, examples, None), examples))


def losses(params):
    """`(forget, retain)`."""
    return [float(retain_loss(params, examples)) for examples in problem()[1:]]


def key(name: str) -> dict:
    """The fields that identify a row."""
    return {"method": name, "method_version": METHODS[name].version}


def unlearn(name: str, params=None) -> dict:
    """Runs a method from the original parameters, or from `params`; returns the fields of a row."""
    original, forget, retain = problem()
    params = original if params is None else params
    settings = default_settings(METHODS[name], TASK) | OTHER_SETTINGS.get(name, {})
    before = losses(params)
    result = eupmu.unlearn(
        name,
        TASK,
        params,
        forget,
        retain,
        # A linear model memorises nothing, so retained examples can stand for unseen ones.
        retain if METHODS[name].transports else None,
        steps=STEPS,
        settings=settings,
        forget_batch=FORGET_BATCH,
        retain_batch=RETAIN_BATCH,
        start={"retain_loss": before[1], "retain_error": float(retain_error(params, retain))},
        probes=0,
    )
    after = losses(result.params)
    change = jax.tree.map(jnp.subtract, result.params, params)
    return {
        "settings": settings,
        "steps": STEPS,
        "forget_loss": [before[0], after[0]],
        "retain_loss": [before[1], after[1]],
        "change": float(optax.tree.norm(change)),
    }


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    made_by = origin.of(__file__)
    for name in METHODS:
        rows.add(ROWS, key(name), functools.partial(unlearn, name), made_by)


if __name__ == "__main__":
    main()
