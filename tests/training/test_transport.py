"""EUPMU transport on digits: where it ends, what stops it, what it refuses, and that it resumes bit for bit."""

import functools
import itertools
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from eupmu_jax import unlearn
from eupmu_jax.models import MLP
from eupmu_jax.tasks import Examples, classification
from eupmu_jax.training.rounds import detectable, ends_of, rounds_of
from eupmu_jax.training.targets import scores_of, targets_of
from tests.training.conftest import TASK, Store

METHOD = "EUPMU transport"


class Stopped(Exception):  # noqa: N818
    pass


@pytest.fixture(scope="module")
def random(digits):
    """Keyword arguments for a run that forgets 150 digits drawn at random."""
    order = np.random.default_rng(0).permutation(len(digits.tree["labels"]))
    sets = {"forget": Examples(digits.tree, order[:150]), "retain": Examples(digits.tree, order[150:])}
    return {"task": TASK, "params": digits.params, "held_out": digits.held_out} | sets


def run(random, **options):
    return unlearn(METHOD, **random, **{"forget_batch": 25, "retain_batch": 75, "probes": 1} | options)


def test_a_random_forget_set_comes_to_look_like_unseen_data(random):
    result, before = run(random, steps=120), run(random, steps=1, settings={"length": 1e-9})
    assert before.level.comparison.high < 0
    assert result.level.comparison.low < 0 < result.level.comparison.high
    assert result.level.comparison.losses_p_value > 0.05
    assert result.level.kept
    assert (result.steps, result.ended) == (120, "steps")


def test_a_class_is_forgotten_without_unseen_data(digits):
    options = {"steps": 60, "forget_batch": 16, "settings": {"length": 3.0}}
    result = unlearn(METHOD, TASK, digits.params, digits.forget, digits.retain, **options)
    assert result.level.forget_error > 0.95
    assert result.level.kept


def test_a_run_without_a_number_of_steps_ends_when_it_is_reached_or_its_budget_is_spent(random, digits):
    reached = run(random, steps=None)
    assert reached.ended == "reached"
    assert reached.steps in ends_of(
        rounds_of((150, len(random["retain"])), (25, 75), len(digits.held_out["labels"]), None)
    )
    assert reached.level.comparison.losses_p_value > 0.05
    # Unseen data with wrong labels, and a path that is too short to get anywhere.
    wrong = random | {"held_out": digits.held_out | {"labels": (digits.held_out["labels"] + 1) % 10}}
    spent = run(wrong, steps=None, budget=6_000, settings={"length": 1e-9}, retain_batch=25)
    assert (spent.ended, spent.steps) == ("budget", 120)


def test_the_schedule_of_a_run_without_a_number_of_steps_is_that_of_its_rounds(random):
    # One round is a run of that many steps.
    (steps,) = rounds_of((150, len(random["retain"])), (25, 75), 360, 1_000)
    one = run(random, steps=None, budget=1_000)
    chex.assert_trees_all_equal(one.params, run(random, steps=steps).params)


@pytest.mark.parametrize("options", [{"steps": 12}, {"steps": None, "budget": 6_000}])
def test_a_stopped_run_resumes_bit_for_bit(random, tmp_path, options):
    whole = run(random, **options)
    start = functools.partial(run, random, directory=tmp_path, save_every=5, **options)
    made = []

    def on_step():
        made.append(1)
        if len(made) == 8:
            raise Stopped

    with pytest.raises(Stopped):
        start(on_step=on_step)
    for on_step in (lambda: None, lambda: pytest.fail("made a step")):
        again = start(on_step=on_step)
        chex.assert_trees_all_equal(again.params, whole.params)
        assert (again.steps, again.ended, again.forward) == (whole.steps, whole.ended, whole.forward)


def test_a_run_with_another_score_does_not_resume(random, tmp_path):
    run(random, steps=2, directory=tmp_path)
    other = TASK._replace(score=lambda outputs, batch: 2 * TASK.score(outputs, batch))
    with pytest.raises(ValueError, match=r"^directory: .* holds another run; got losses"):
        run(random | {"task": other}, steps=2, directory=tmp_path)


def test_examples_that_are_read_batch_by_batch_give_the_same_run(random, digits):
    of = lambda part: Store({name: np.asarray(leaf)[part.ids] for name, leaf in digits.tree.items()})
    sets = {name: of(random[name]) for name in ("forget", "retain")}
    chex.assert_trees_all_close(run(random | sets, steps=5).params, run(random, steps=5).params, atol=1e-5)


def test_flax_states_and_frozen_leaves(random, digits):
    model = MLP((64, 16, 10), rngs=nnx.Rngs(0))
    graph, params = nnx.split(model)
    task = classification(lambda params, inputs: nnx.merge(graph, params)(inputs), 10)
    given = random | {"task": task, "params": params}
    result = run(given, steps=3, settings={"allowed_error": 1.0})
    assert jax.tree.structure(result.params) == jax.tree.structure(params)
    kept = run(random, steps=3, frozen={"hidden": True, "head": False, "bias": False})
    chex.assert_trees_all_equal(kept.params["hidden"], digits.params["hidden"])
    assert not jnp.array_equal(kept.params["head"], digits.params["head"])


def test_targets_have_the_mix_of_classes_of_the_forget_set(random, digits):
    labels = np.asarray(digits.held_out["labels"])
    both = np.isin(labels, (1, 8))
    of_both = jax.tree.map(lambda leaf: leaf[both], digits.held_out)
    forget = Examples(digits.tree, np.flatnonzero(np.isin(np.asarray(digits.tree["labels"]), (1, 8)))[:60])
    targets = lambda held_out: targets_of(TASK, digits.params, forget, random["retain"], _examples(held_out), ())[0]
    np.testing.assert_array_equal(targets(digits.held_out), targets(of_both))


def _examples(tree):
    return Examples(tree, np.arange(len(tree["labels"])))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"held_out": None}, r"^held_out: got None, but the scores of unseen data are the targets"),
        ({"steps": 3, "budget": 100}, r"^budget: got 100 with 3 steps, expected steps=None, or no budget"),
        ({"steps": 0}, r"^steps: got 0, expected"),
        ({"steps": None, "budget": 0}, r"^budget: got 0, expected"),
        ({"steps": None, "budget": 99}, r"^budget: got 99 examples, expected at least 256, which one step passes"),
        ({"settings": {"length": -1.0}}, r"^settings\['length'\]: got -1.0"),
        ({"task": TASK._replace(score=None)}, r"^task.score: got None, but EUPMU transport needs it"),
        (
            {"task": TASK._replace(score=lambda outputs, batch: outputs[:, 0] * jnp.inf)},
            r"^forget: got a score of .* at position 0 under the original model, expected finite scores",
        ),
    ],
)
def test_what_cannot_be_run_is_refused_by_name(random, changes, message):
    with pytest.raises(ValueError, match=message):
        unlearn(METHOD, **random | {"on_step": lambda: pytest.fail("made a step")} | changes)


def test_too_few_unseen_examples_are_refused_and_few_are_doubted(random, digits, caplog):
    first = lambda count: jax.tree.map(lambda leaf: leaf[:count], digits.held_out)
    with pytest.raises(ValueError, match=r"^held_out: got 4 examples .*, too few for quantiles"):
        unlearn(METHOD, **random | {"held_out": first(4)})
    run(random | {"held_out": first(30)}, steps=1, settings={"length": 1e-9})
    assert "held_out: got 30 examples, whose quantiles are rough" in caplog.text


def test_unseen_data_that_are_easier_than_the_forget_set_teach_it_nothing(random, digits, caplog):
    # Digits of which the model is surest, in place of unseen ones.
    scores = scores_of(TASK, digits.params, random["retain"])
    surest = random["retain"].ids[np.argsort(scores)[-300:]]
    result = run(random | {"held_out": jax.tree.map(lambda leaf: leaf[surest], digits.tree)}, steps=20)
    assert "held_out: the original model is as sure of unseen examples" in caplog.text
    assert result.level.forget_error < 0.03


def test_only_this_method_runs_without_a_number_of_steps(digits):
    with pytest.raises(ValueError, match=r"^steps: got None, but weighted sum needs to know its steps"):
        digits.unlearn("weighted sum", steps=None)


def test_rounds_double_and_spend_the_budget():
    rounds = rounds_of((400, 3600), (16, 48), 1000, 100_000)
    assert sum(rounds) == 100_000 // 64
    assert all(later >= 2 * one for one, later in itertools.pairwise(rounds))
    # The test after the first round costs less than a twentieth of it.
    assert 0.05 * 3 * 64 * rounds[0] >= 1_400


def test_the_stated_power_is_that_of_the_test():
    from scipy import stats

    rng, count = np.random.default_rng(0), 300
    shift = 2 * stats.norm.ppf(0.5 + detectable(count, count) / 2)
    found = [stats.ks_2samp(rng.normal(size=count), rng.normal(shift, size=count)).pvalue < 0.05 for _ in range(200)]
    assert np.mean(found) > 0.8


MESH_SCRIPT = """
import jax, jax.numpy as jnp, numpy as np
from eupmu_jax import sharding, unlearn
from tests.training.conftest import Digits, TASK

digits, mesh = Digits(), sharding.make_mesh(4, 2)
part = lambda at: jax.tree.map(lambda leaf: np.asarray(leaf)[at], digits.tree)
sets = part(slice(100)), part(slice(100, None)), jax.tree.map(np.asarray, digits.held_out)
options = {"steps": 5, "forget_batch": 16, "retain_batch": 48, "probes": 0, "settings": {"limit": 1.0}}
run = lambda mesh: unlearn("EUPMU transport", TASK, digits.params, *sets, mesh=mesh, **options).params
one, many = run(None), run(mesh)
assert np.max(np.abs(one["head"] - digits.params["head"])) > 1e-3
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), many, one)
"""


@pytest.mark.slow
def test_eight_devices_give_the_result_of_one(on_devices):
    finished = subprocess.run([sys.executable, "-c", MESH_SCRIPT], env=on_devices(8), capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-2000:]
