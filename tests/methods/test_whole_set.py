import chex
import jax
import pytest

from eupmu_jax import objectives
from eupmu_jax.methods._whole_set import CHUNK, mean_gradient


def test_chunks_add_up_to_the_whole_set(problem):
    data = problem.retain
    assert len(data["labels"]) > 2 * CHUNK
    assert len(data["labels"]) % CHUNK
    loss = lambda params: objectives.cross_entropy(problem.problem.apply(params, data["images"]), data["labels"])
    expected = jax.grad(loss)(problem.params)
    actual = mean_gradient(problem.problem.apply, problem.params, data)
    chex.assert_trees_all_close(actual, expected, atol=1e-6, rtol=1e-4)


def test_an_empty_set_is_an_error(problem):
    empty = {name: array[:0] for name, array in problem.forget.items()}
    with pytest.raises(ValueError, match=r"^data: got an empty set, expected at least one example"):
        mean_gradient(problem.problem.apply, problem.params, empty)
