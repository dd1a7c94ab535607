import gc

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eupmu_jax import tasks, unlearn
from eupmu_jax._stack.programs import jit_for_task, owner
from eupmu_jax.tasks import as_examples
from eupmu_jax.training.footprint import footprint
from eupmu_jax.training.relearning import relearn

pytestmark = pytest.mark.slow

SIZE = 100_000


def data(count, seed):
    inputs = jax.random.normal(jax.random.key(seed), (count, 4))
    return {"inputs": inputs, "labels": (inputs[:, 0] > 0).astype(int)}


def apply(params, inputs):
    return inputs @ params["head"] + jnp.sum(params["base"])


def fresh_params(key):
    return {"base": jnp.zeros(SIZE), "head": jnp.zeros((4, 2))}


# As in a user's program, all runs share one task; only what a run derives from it is new.
# BUG: after the last step of EUPMU, `check_model` got the parameters without the frozen ones.
TASK = tasks.classification(apply, num_classes=2, fresh_params=fresh_params)._replace(
    check_model=lambda params, batch: apply(params, batch["inputs"])
)
MASK = {"base": True, "head": False}
SETS = data(8, 0), data(24, 1), data(16, 2)


def run(method):
    return unlearn(method, TASK, fresh_params(None), *SETS, steps=2, probes=1, frozen=MASK).params


def bytes_alive():
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


@pytest.mark.parametrize("method", ["EUPMU", "influence"])
def test_frozen_parameters_are_released_after_their_run(method):
    alive = []
    for _ in range(3):
        assert np.all(run(method)["base"] == 0)
        alive.append(bytes_alive())
    assert alive[2] - alive[0] < jnp.zeros(SIZE).nbytes


def test_runs_of_one_task_share_compiled_code_even_with_a_frozen_run_between_them(monkeypatch):
    counted = []
    task = TASK._replace(outputs=lambda *given: counted.append(1) or TASK.outputs(*given))
    start = lambda frozen: unlearn("EUPMU", task, fresh_params(None), *SETS, steps=2, probes=1, frozen=frozen).params
    first = start(None)
    start(MASK)
    traced = len(counted)
    chex.assert_trees_all_equal(start(None), first)
    assert len(counted) == traced


def test_tasks_with_an_owner_have_programs_of_their_own():
    traced = []

    def scaled(task, power, inputs):
        traced.append(power)
        return task.outputs(2.0, inputs, None) ** power

    compiled = jit_for_task(choices=1)(scaled)
    outputs = lambda params, inputs, key: params * inputs
    for task in (TASK._replace(outputs=outputs), TASK._replace(outputs=owner(lambda *given: outputs(*given)))):
        assert [float(compiled(task, power, 3.0)) for power in (1, 2, 2)] == [6.0, 36.0, 36.0]
    assert traced == [1, 2, 1, 2]


def test_frozen_leaves_are_returned_as_they_were_given():
    # BUG: 64-bit numbers came back as 32-bit ones of other values.
    count = np.array([2**40])
    params = fresh_params(None) | {"count": count, "scale": 1.5}
    task = TASK._replace(outputs=lambda params, batch, key: apply(params, batch["inputs"]))
    frozen = MASK | {"count": True, "scale": True}
    found = unlearn("weighted sum", task, params, *SETS, steps=2, probes=0, frozen=frozen).params
    assert found["count"] is count
    assert found["scale"] == 1.5
    with pytest.raises(ValueError, match=r"^params: leaf \['name'\] is 'resnet', expected numbers"):
        unlearn("weighted sum", task, params | {"name": "resnet"}, *SETS, frozen=frozen | {"name": True})


def test_a_function_that_says_what_is_frozen_is_called_once():
    asked = []
    frozen = lambda params: asked.append(1) or MASK
    unlearn("weighted sum", TASK, fresh_params(None), *SETS, steps=1, probes=0, frozen=frozen)
    assert asked == [1]


def test_a_footprint_counts_no_state_for_frozen_parameters():
    # BUG: a plan for adapters counted moments for their frozen base, and an integer base was refused.
    size = lambda frozen: footprint("EUPMU", TASK, fresh_params(None), *SETS, steps=2, frozen=frozen).arguments
    base = fresh_params(None)["base"].nbytes
    assert size(MASK) < 1.1 * base
    assert size(None) > 3 * base
    assert size(lambda params: MASK) == size(MASK)


def test_relearning_leaves_frozen_parameters_alone():
    moved = lambda **options: relearn(
        TASK, fresh_params(None), *(as_examples("train", SETS[1]),) * 2, steps=5, every=5, batch_size=8, **options
    )
    # The base gives all classes the same logit, so training it changes no prediction.
    assert moved(frozen={"base": False, "head": True}, learning_rate=1e-5).accuracy[-1] == moved().accuracy[0]
    chex.assert_trees_all_equal(moved(frozen=MASK, learning_rate=0.1), moved(learning_rate=0.1))
    with pytest.raises(ValueError, match=r"^frozen: got no leaf \['head'\], expected the structure of params$"):
        moved(frozen={"base": True})
    with pytest.raises(ValueError, match=r"^frozen: got a function of \(path, leaf\), expected one of params alone"):
        moved(frozen=lambda path, leaf: True)
