import chex
import jax
import numpy as np
import pytest

from eupmu_jax import objectives
from eupmu_jax.methods._whole_set import CHUNK, mean_gradient
from eupmu_jax.tasks import Examples


@pytest.mark.slow
def test_chunks_add_up_to_the_whole_set(digits):
    task, data = digits.task, digits.retain
    assert len(data) > 2 * CHUNK
    assert len(data) % CHUNK
    loss = lambda params: objectives.cross_entropy(task.outputs(params, data.tree, None), data.tree["labels"])
    expected = jax.grad(loss)(digits.params)
    actual = mean_gradient(task, digits.params, data)
    chex.assert_trees_all_close(actual, expected, atol=1e-6, rtol=1e-4)


def test_an_empty_set_is_refused(digits):
    empty = Examples(digits.forget.tree, np.array([], int))
    with pytest.raises(ValueError, match=r"^data: got an empty set, expected at least one example"):
        mean_gradient(digits.task, digits.params, empty)
