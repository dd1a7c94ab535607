"""A user's small digits model, trained once for all tests of `unlearn`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eupmu_jax import data, unlearn
from eupmu_jax.tasks import as_examples, classification
from eupmu_jax.training import fitting

FROZEN = {"hidden": True, "head": False, "bias": False}
BOUNDED = {"learning_rate": 0.003, "forget_objective": "bounded_ascent"}
SETTINGS = {
    "weighted sum": BOUNDED | {"retain_weight": 1.0},
    "EUPMU explicit": BOUNDED | {"allowed_rise": 0.05},
    "EUPMU": BOUNDED | {"allowed_rise": 0.05},
}


def apply(params, inputs):
    return jnp.tanh(inputs @ params["hidden"]) @ params["head"] + params["bias"]


TASK = classification(apply, num_classes=10)


class Digits:
    """Trained parameters; all digits, those of class 3, the others, and some held out from training."""

    def __init__(self):
        loaded = data.load("digits", seed=0)
        flat = lambda images, labels: {"inputs": images.reshape(-1, 64), "labels": labels}
        tree = flat(loaded.train_images, loaded.train_labels)
        is_forgotten = loaded.train_labels == 3
        self.forget, self.retain = (jax.tree.map(lambda leaf: leaf[at], tree) for at in (is_forgotten, ~is_forgotten))  # noqa: B023
        self.held_out = flat(loaded.test_images, loaded.test_labels)
        self.tree, self.ids = tree, (np.flatnonzero(is_forgotten), np.flatnonzero(~is_forgotten))
        keys = jax.random.split(jax.random.key(0))
        start = {
            "hidden": jax.random.normal(keys[0], (64, 32)) / 8,
            "head": jax.random.normal(keys[1], (32, 10)) / 6,
            "bias": jnp.zeros(10),
        }
        recipe = {"epochs": 15, "batch_size": 64, "learning_rate": 0.01, "seed": 0}
        self.params = fitting.fit_task(TASK, start, as_examples("train", tree), **recipe).params

    def unlearn(self, method, *, settings=None, **options):
        settings = SETTINGS.get(method) if settings is None else settings
        options = {"steps": 12, "forget_batch": 16, "retain_batch": 48, "probes": 0} | options
        return unlearn(method, TASK, self.params, self.forget, self.retain, settings=settings, **options)


@pytest.fixture(scope="session")
def digits():
    return Digits()


class Store:
    """A source of examples that is read by arrays of positions."""

    def __init__(self, tree):
        self.tree, self.asked = tree, []

    def __len__(self):
        return len(self.tree["labels"])

    def __getitem__(self, positions):
        self.asked.append(len(positions))
        return {name: leaf[positions] for name, leaf in self.tree.items()}
