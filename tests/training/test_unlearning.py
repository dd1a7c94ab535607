import chex
import jax
import numpy as np
import pytest

from eupmu_jax.benchmark import problems
from eupmu_jax.commands.demo import METHODS
from eupmu_jax.methods import loss_of
from eupmu_jax.training.unlearning import Plan, run_method

PLAN = Plan(steps=18, forget_batch=16, retain_batch=144, probes=4)
SETTINGS = {
    "learning_rate": 0.1,
    "forget_objective": "bounded_ascent",
    "retain_weight": 1.0,
    "multiplier_learning_rate": 1.0,
    "allowed_rise": 0.01,
}
PASSES = {
    "fine-tuning": ((0, 1), (0, 1)),
    "gradient ascent": ((1, 0), (1, 0)),
    "random labels": ((1, 1), (1, 1)),
    "EUPMU explicit": ((1, 1), (1, 1)),
    "EUPMU implicit": ((1, 2), (1, 1)),
    "EUPMU next-batch": ((1, 1), (1, 1)),
}


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    prepared = problems.make("digits", "class:3", seed=0, recipe=problems.Recipe(10, 64, 1e-3))
    model = problems.train(
        prepared,
        np.arange(len(prepared.labels)),
        init_seed=0,
        cache=tmp_path_factory.mktemp("cache"),
        on_step=lambda: None,
    )
    return prepared, model.params


@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_the_contract(problem, method):
    prepared, params = problem
    before = jax.tree.map(np.asarray, params)
    ticks = []
    run = run_method(method, SETTINGS, PLAN, prepared, params, seed=0, on_step=lambda: ticks.append(1))
    steps = PLAN.steps
    assert len(ticks) == steps
    chex.assert_trees_all_equal_shapes_and_dtypes(run.params, params)
    chex.assert_trees_all_equal(params, before)
    chex.assert_tree_all_finite(run.params)
    (forget_forward, retain_forward), (forget_backward, retain_backward) = PASSES[method]
    assert run.forward == steps * (16 * forget_forward + 144 * retain_forward)
    assert run.backward == steps * (16 * forget_backward + 144 * retain_backward)
    assert {len(values) for values in run.history.values()} == {PLAN.probes + 1}
    assert run.history["step"][0] == 0
    assert run.history["step"][-1] == steps
    assert all(np.isnan(value) != method.startswith("EUPMU") for value in run.history["multiplier"])
    assert all(-1.001 <= value <= 1.001 for value in run.history["cosine"])


def test_a_run_is_reproduced_by_its_seed(problem):
    prepared, params = problem
    first, again, other = (run_method("random labels", SETTINGS, PLAN, prepared, params, seed=s) for s in (0, 0, 1))
    chex.assert_trees_all_equal(first.params, again.params)
    assert first.history["forget_loss"] == again.history["forget_loss"]
    assert first.history["forget_loss"] != other.history["forget_loss"]


def test_forget_losses_move_the_way_they_should(problem):
    prepared, params = problem
    ascent = run_method("gradient ascent", SETTINGS, PLAN, prepared, params, seed=0).history
    tuned = run_method("fine-tuning", SETTINGS, PLAN, prepared, params, seed=0).history
    assert ascent["forget_loss"][-1] > 2 * ascent["forget_loss"][0]
    assert tuned["retain_loss"][-1] < tuned["retain_loss"][0]


def test_an_unknown_forget_objective_lists_the_known():
    with pytest.raises(ValueError, match=r"^forget_objective: got 'kindness', expected one of random_labels, "):
        loss_of(lambda params, images: images, "kindness")


def test_a_forget_set_smaller_than_a_batch_is_one_batch():
    assert Plan.of_epochs(3, 64, 576, num_forget=10).steps == 3
    assert Plan.of_epochs(3, 64, 576, num_forget=65).steps == 6
