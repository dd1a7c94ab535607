"""A small classifier of real digits that unlearns two classes, and a one-parameter problem with a known solution."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from eupmu_jax import data
from eupmu_jax.methods import Terms
from eupmu_jax.models import MLP, functional
from eupmu_jax.tasks import Examples, Task, as_examples, classification
from eupmu_jax.training import fitting
from eupmu_jax.training.relearning import accuracy
from eupmu_jax.training.unlearning import unlearn

FORGOTTEN_CLASSES = (3, 8)


class Digits(NamedTuple):
    """A classifier of digits: about 290 examples of two classes are to be forgotten, about 1,150 others retained.

    Attributes:
        task: The task of an MLP with 64 hidden units.
        params: Parameters that fit both sets.
        forget, retain: The sets, each with its own tree of `inputs` and `labels`.
    """

    task: Task
    params: dict
    forget: Examples
    retain: Examples

    def run(self, method: str, settings: dict, *, steps: int = 20, seed: int = 0, params=None, **more):
        """The unlearned parameters. The optimizer is SGD, whose step length is given by the learning rate."""
        params = self.params if params is None else params
        options = {"steps": steps, "seed": seed, "forget_batch": 32, "retain_batch": 128, "probes": 0} | more
        settings = {"optimizer": "sgd"} | settings
        return unlearn(method, self.task, params, self.forget, self.retain, settings=settings, **options).params

    def terms(self, steps: int) -> Terms:
        """The terms of a run of `steps` steps."""
        return Terms(len(self.forget), len(self.retain), steps, self.loss(self.params, self.retain))

    def accuracy(self, params, examples: Examples) -> float:
        """The share of the examples that are classified correctly."""
        return accuracy(self.task, params, examples) / 100

    def loss(self, params, examples: Examples) -> float:
        """The mean cross-entropy."""
        return float(self.task.retain(self.task.outputs(params, examples.tree, None), examples.tree))


@pytest.fixture(scope="session")
def digits() -> Digits:
    loaded = data.load("digits", seed=0)
    initial = lambda key: functional(MLP((64, 64, 10), rngs=nnx.Rngs(key)))
    forward = initial(jax.random.key(0))[2]
    task = classification(
        lambda params, inputs: forward(params, {}, inputs, False)[0],
        num_classes=10,
        fresh_params=lambda key: initial(key)[0],
    )
    everything = {"inputs": jnp.asarray(loaded.train_images), "labels": jnp.asarray(loaded.train_labels)}
    params = fitting.fit_task(
        task,
        task.fresh_params(jax.random.key(0)),
        as_examples("train", everything),
        epochs=60,
        batch_size=64,
        learning_rate=3e-3,
        seed=0,
    ).params
    forgotten = np.isin(loaded.train_labels, FORGOTTEN_CLASSES)
    sets = (jax.tree.map(lambda leaf: leaf[part], everything) for part in (forgotten, ~forgotten))  # noqa: B023
    return Digits(task, params, *(as_examples("set", tree) for tree in sets))


@pytest.fixture(scope="session")
def rise_of_one_logit() -> Callable:
    """`(make, settings, steps) -> rise` of the retain loss, for a problem with a known solution.

    Whatever the input, the model is a single logit, which starts at 4. The forget loss pulls it to 0, where the retain
    loss is ln 2, and the retain loss pushes it up. A method with a limit ends where the retain loss meets it.
    """
    start = jnp.array(4.0)
    retain_loss = lambda logit: float(jnp.log1p(jnp.exp(-logit)))
    task = classification(lambda params, x: jnp.stack([params * x, jnp.zeros_like(x)], axis=-1), num_classes=2)
    batches = tuple({"inputs": jnp.ones(size), "labels": jnp.zeros(size, int)} for size in (4, 8))

    def solve(make, settings, steps):
        settings = {"optimizer": "sgd", "forget_objective": "kl_to_uniform"} | settings
        procedure = make(task, Terms(4, 8, steps, retain_loss(start)), settings)

        def step(carry, count):
            return procedure.step(carry[0], (), carry[1], batches, count, jax.random.key(0)), None

        (params, _), _ = jax.lax.scan(step, (start, procedure.init(start, ())), jnp.arange(steps))
        return retain_loss(params) - retain_loss(start)

    return solve
