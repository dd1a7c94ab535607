"""Examples that a task refuses are refused by every function that reads them."""

import jax.numpy as jnp
import pytest

from eupmu_jax import tasks
from eupmu_jax.training import fitting, relearning

TASK = tasks.classification(lambda weights, inputs: inputs @ weights, num_classes=2)
WEIGHTS = jnp.zeros((2, 2))
GOOD, BAD = (tasks.as_examples("data", {"inputs": jnp.eye(2), "labels": jnp.array([0, last])}) for last in (1, 5))
STEPS = {"steps": 1, "batch_size": 1}
READERS = {
    "train": lambda: relearning.relearn(TASK, WEIGHTS, BAD, GOOD, every=1, **STEPS),
    "watch": lambda: relearning.relearn(TASK, WEIGHTS, GOOD, BAD, every=1, **STEPS),
    "examples": lambda: relearning.relearn_part(TASK, WEIGHTS, jnp.ones((2, 2), bool), BAD, **STEPS),
    "examples, fit_task": lambda: fitting.fit_task(
        TASK, WEIGHTS, BAD, epochs=1, batch_size=1, learning_rate=1.0, seed=0
    ),
}


@pytest.mark.parametrize("name", list(READERS))
def test_the_error_names_the_set(name):
    with pytest.raises(ValueError, match=rf"^{name.partition(',')[0]}: labels: got 5, expected ints from 0 to 1"):
        READERS[name]()
