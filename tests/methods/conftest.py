"""A small unlearning problem on real digits, and one run of a method on it."""

import collections
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from eupmu_jax import objectives
from eupmu_jax.data import digits
from eupmu_jax.methods import Problem
from eupmu_jax.models import MLP, functional
from eupmu_jax.training import fitting

FORGOTTEN_CLASSES = (3, 8)
FORGET_BATCH, RETAIN_BATCH = 32, 128


class DigitsProblem(NamedTuple):
    """About 290 examples of two classes are to be forgotten, and about 1,150 of the others retained.

    Attributes:
      problem: Its `steps` are replaced in `run`.
      params: Of an MLP of 64 hidden units that fits both sets.
      forget, retain, test: Dicts of `images` and `labels`.
      traces: How often each step was traced, by method and static settings.
    """

    problem: Problem
    params: dict
    forget: dict
    retain: dict
    test: dict
    traces: collections.Counter

    def run(self, make: Callable, settings: dict, *, steps: int = 20, seed: int = 0, params=None):
        """Prepares, makes the jitted steps and finishes; returns the parameters.

        As in a search, numbers are traced and strings are not, and parameters and state are donated.
        """
        params = self.params if params is None else params
        problem = self.problem._replace(steps=steps)
        key, rng = jax.random.key(seed), np.random.default_rng(seed)
        # In the order in which jit gives dicts back.
        settings = dict(sorted(settings.items()))
        numbers = {name: value for name, value in settings.items() if not isinstance(value, str)}
        strings = tuple((name, value) for name, value in settings.items() if isinstance(value, str))
        procedure = make(problem, settings)
        prepare = procedure.prepare or (lambda *_: ())
        prepared = prepare(params, self.forget, self.retain, key)
        state = procedure.init(params, prepared)
        params = jax.tree.map(jnp.array, params)
        for count in range(steps):
            ids = [
                rng.choice(len(part["labels"]), size, replace=False)
                for part, size in ((self.forget, FORGET_BATCH), (self.retain, RETAIN_BATCH))
            ]
            params, state = _step(
                _Static(make, problem, strings, self.traces),
                params,
                prepared,
                state,
                (self.forget, self.retain),
                ids,
                numbers,
                jnp.int32(count),
                jax.random.fold_in(key, count),
            )
        return procedure.finish(params, prepared, self.forget, self.retain) if procedure.finish else params

    def accuracy(self, params, data: dict) -> float:
        """Share of `data` that is classified as labelled."""
        return float(jnp.mean(jnp.argmax(self.problem.apply(params, data["images"]), -1) == data["labels"]))

    def loss(self, params, data: dict) -> float:
        """Mean cross-entropy."""
        return float(objectives.cross_entropy(self.problem.apply(params, data["images"]), data["labels"]))


class _Static:
    """What chooses the code of a step; `traces` counts but does not choose."""

    def __init__(self, make, problem, strings, traces):
        self.make, self.problem, self.strings, self.traces = make, problem, strings, traces
        self.key = (make, problem, strings)

    def __hash__(self):
        return hash(self.key)

    def __eq__(self, other):
        return self.key == other.key


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 3))
def _step(static, params, prepared, state, data, ids, numbers, count, key):
    static.traces[static.make, static.strings] += 1
    batches = []
    for part, chosen in zip(data, ids, strict=True):
        batch = {name: array[chosen] for name, array in part.items()}
        drawn = objectives.random_labels(jax.random.fold_in(key, 1), batch["labels"], static.problem.num_classes)
        batches.append(batch | {"random_labels": drawn})
    procedure = static.make(static.problem, numbers | dict(static.strings))
    return procedure.step(params, prepared, state, tuple(batches), count, key)


@pytest.fixture(scope="session")
def problem() -> DigitsProblem:
    images, labels, test_images, test_labels = digits.load(seed=0)
    initial = lambda seed: functional(MLP((64, 64, 10), rngs=nnx.Rngs(seed)))
    _, _, forward = initial(0)
    apply = lambda params, images: forward(params, {}, images, False)[0]
    fresh_params = lambda key: initial(key)[0]
    images, labels = jnp.asarray(images), jnp.asarray(labels)
    params = fitting.fit(
        forward,
        fresh_params(jax.random.key(0)),
        {},
        images,
        labels,
        np.arange(len(labels)),
        epochs=60,
        batch_size=64,
        learning_rate=3e-3,
        seed=0,
    ).params
    forgotten = np.isin(np.asarray(labels), FORGOTTEN_CLASSES)
    forget, retain = ({"images": images[part], "labels": labels[part]} for part in (forgotten, ~forgotten))
    return DigitsProblem(
        Problem(
            apply=apply,
            fresh_params=fresh_params,
            num_classes=10,
            num_forget=int(forgotten.sum()),
            num_retain=int((~forgotten).sum()),
            steps=0,
            retain_loss=float(objectives.cross_entropy(apply(params, retain["images"]), retain["labels"])),
        ),
        params,
        forget,
        retain,
        {"images": jnp.asarray(test_images), "labels": jnp.asarray(test_labels)},
        collections.Counter(),
    )


@pytest.fixture(scope="session")
def rise_of_one_logit() -> Callable:
    """`(make, settings, steps) -> rise` of the retain loss where everything is known.

    The model is one logit, 4 at first, whatever the image. The forget objective wants it at 0, where the retain loss is
    ln 2, and the retain loss wants it large; a method under a limit ends where the retain loss meets it.
    """
    start = jnp.array(4.0)
    retain_loss = lambda logit: float(jnp.log1p(jnp.exp(-logit)))
    apply = lambda params, images: jnp.stack([params * images, jnp.zeros_like(images)], axis=-1)
    labels = [jnp.zeros(size, int) for size in (4, 8)]
    batches = tuple({"images": jnp.ones(len(y)), "labels": y, "random_labels": 1 - y} for y in labels)

    def solve(make, settings, steps):
        problem = Problem(apply, lambda key: start, 2, 4, 8, steps, retain_loss(start))
        procedure = make(problem, {"forget_objective": "kl_to_uniform"} | settings)

        def step(carry, count):
            return procedure.step(carry[0], (), carry[1], batches, count, jax.random.key(0)), None

        (params, _), _ = jax.lax.scan(step, (start, procedure.init(start, ())), jnp.arange(steps))
        return retain_loss(params) - retain_loss(start)

    return solve
