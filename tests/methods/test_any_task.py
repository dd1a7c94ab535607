"""Every method on a task that is not classification: the progression of diabetes a year after ten measurements."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_diabetes

from eupmu_jax import methods
from eupmu_jax.methods import METHODS, Terms, aggregated
from eupmu_jax.tasks import Task, as_examples
from eupmu_jax.training.unlearning import unlearn

pytestmark = pytest.mark.slow

FORGET = 42
# These methods add a class, or search for the boundary of one.
FOR_CLASSIFIERS = ("boundary shrink", "boundary expand")
FOR_ALL = [name for name in METHODS if name not in FOR_CLASSIFIERS]
# Of the aggregators, one of the Gram matrix, one of the losses and one with steps of its own stand for all.
CHOSEN = ("mean", "FAMO", "NGDiff")
SOME = [name for name in FOR_ALL if METHODS[name].family != aggregated.FAMILY or name in CHOSEN]


class Patients(NamedTuple):
    measures: chex.Array
    progression: chex.Array
    other: chex.Array


def outputs(params, batch, key):
    noise = 0.0 if key is None else 0.3 * jax.random.normal(key)
    return (batch.measures @ params["w"] + params["b"]) * (1 + noise)


def squares(predicted, batch):
    return jnp.mean((predicted - batch.progression) ** 2)


TASK = Task(
    outputs=outputs,
    retain=squares,
    forget={
        "bounded_ascent": lambda predicted, batch: jnp.mean(jax.nn.relu(4 - (predicted - batch.progression) ** 2)),
        "random_labels": lambda predicted, batch: jnp.mean((predicted - batch.other) ** 2),
        "gradient_ascent": lambda predicted, batch: -squares(predicted, batch),
    },
    divergence=lambda predicted, taught: jnp.mean((predicted - taught) ** 2),
    # Ignores the key, so that only the outputs depend on it.
    draw=lambda key, epoch, batch: batch._replace(other=jnp.roll(batch.progression, epoch + 1)),
    error=lambda predicted, batch: jnp.abs(predicted - batch.progression),
    fresh_params=lambda key: {"w": jnp.zeros(10), "b": jnp.zeros([])},
    score=lambda predicted, batch: -jnp.abs(predicted - batch.progression),
)


@pytest.fixture(scope="module")
def fitted():
    """Least squares parameters for all patients, the patients to be forgotten, and the others."""
    measures, progression = load_diabetes(return_X_y=True)
    measures = np.float32(measures * np.sqrt(len(measures)))
    progression = np.float32((progression - progression.mean()) / progression.std())
    weights = np.linalg.lstsq(measures, progression, rcond=None)[0]
    patients = Patients(measures, progression, progression)
    sets = (jax.tree.map(lambda leaf: leaf[part], patients) for part in (np.s_[:FORGET], np.s_[FORGET:]))  # noqa: B023
    return {"w": jnp.asarray(weights), "b": jnp.zeros([])}, *sets


def distance(one, other):
    return float(jnp.sqrt(sum(jnp.sum((a - b) ** 2) for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True))))


def run(name, fitted, seed=0):
    """A run with default settings and whole sets as batches, so that the seed affects only their order and the keys."""
    start = {"retain_loss": 0.48, "retain_error": 0.48}
    more = {"steps": 20, "seed": seed, "forget_batch": 42, "retain_batch": 400, "probes": 0, "start": start}
    # A method that transports needs unseen patients; these are as surprising as patients can be.
    unseen = fitted[2]._replace(progression=fitted[2].progression + 3) if METHODS[name].transports else None
    return unlearn(name, TASK, *fitted, unseen, **more)


@pytest.mark.parametrize("name", SOME)
def test_methods_of_every_kind_run_with_default_settings_and_keys_reach_their_losses(name, fitted):
    result = run(name, fitted)
    chex.assert_trees_all_equal_shapes_and_dtypes(result.params, fitted[0])
    chex.assert_tree_all_finite(result.params)
    moved = distance(result.params, fitted[0])
    assert moved > 0
    chex.assert_trees_all_equal(run(name, fitted).params, result.params)
    difference = distance(run(name, fitted, seed=1).params, result.params)
    if name == "influence":  # Its step is computed in advance, without keys.
        assert difference < 1e-4 * moved
    else:
        assert difference > 1e-3 * moved, "no more than another order of the sums would do"


@pytest.mark.parametrize("name", SOME)
def test_every_forward_pass_of_a_step_gets_a_key(name, fitted):
    params, forget, retain = fitted
    keys = []

    def recorded(params, batch, key):
        keys.append(key)
        return outputs(params, batch, key)

    task, method = TASK._replace(outputs=recorded), METHODS[name]
    settings = methods.default_settings(method, task) | {"target": 0.5}
    procedure = method.make(task, Terms(FORGET, 400, 20, 0.48), settings)
    sets = as_examples("forget", forget), as_examples("retain", retain)
    prepared = procedure.prepare(params, *sets, jax.random.key(0)) if procedure.prepare else ()
    prepared = (prepared, jnp.zeros(FORGET)) if method.transports else prepared
    keys.clear()
    state = procedure.init(params, prepared)
    jax.eval_shape(procedure.step, params, prepared, state, (forget, retain), jnp.int32(0), jax.random.key(0))
    assert all(key is not None for key in keys)
    assert bool(keys) != (name == "influence")


def test_the_default_forget_loss_is_the_first_of_the_task():
    own = lambda outputs, batch: jnp.float32(0)
    task = TASK._replace(forget={"own": own, "bounded_ascent": own})
    assert methods.default_settings(METHODS["EUPMU"], task)["forget_objective"] == "own"
    assert methods.default_settings(METHODS["gradient ascent"], task)["ascent_objective"] == "bounded_ascent"


def test_only_two_methods_need_a_classifier():
    assert len(FOR_ALL) >= 36
    assert [name for name, method in METHODS.items() if "num_classes" in method.requires] == list(FOR_CLASSIFIERS)


def lacking(**parts):
    return TASK._replace(
        outputs=lambda *_: pytest.fail("a forward pass"),
        draw=lambda *_: pytest.fail("a draw"),
        fresh_params=lambda *_: pytest.fail("fresh parameters"),
    )._replace(**parts)


BOUNDED = {"bounded_ascent": TASK.forget["bounded_ascent"]}


@pytest.mark.parametrize(
    ("name", "task", "message"),
    [
        *((name, lacking(), rf"^task\.num_classes: got None, but {name} needs it") for name in FOR_CLASSIFIERS),
        ("SCRUB", lacking(divergence=None), r"^task\.divergence: got None, but SCRUB needs it"),
        ("EUPMU transport", lacking(score=None), r"^task\.score: got None, but EUPMU transport needs it"),
        ("Bad Teacher", lacking(divergence=None), r"^task\.divergence: got None, but Bad Teacher needs it"),
        ("Bad Teacher", lacking(fresh_params=None), r"^task\.fresh_params: got None, but Bad Teacher needs it"),
        (
            "random labels",
            lacking(forget=BOUNDED),
            r"^task\.forget: got bounded_ascent, but random labels needs a forget loss named 'random_labels'",
        ),
        (
            "OFMU",
            lacking(forget={"random_labels": squares}),
            r"^task\.forget: got random_labels, but OFMU needs a forget loss named 'bounded_ascent'",
        ),
        ("weighted sum", lacking(forget={}), r"^task\.forget: got \{\}, expected a dict of at least one forget loss"),
        ("weighted sum", lacking(forget={"a": 1}), r"^task\.forget\['a'\]: got 1, expected a function"),
        ("weighted sum", lacking(outputs=None), r"^task\.outputs: got None, expected a function"),
        ("weighted sum", lacking(retain="squares"), r"^task\.retain: got 'squares', expected a function"),
        ("weighted sum", lacking(error=3), r"^task\.error: got 3, expected a function or None"),
        ("weighted sum", tuple(TASK), r"^task: got tuple, expected a Task, such as eupmu_jax\.tasks\.classification"),
    ],
)
def test_missing_parts_of_a_task_are_named_before_any_work(name, task, message, fitted):
    with pytest.raises(ValueError, match=message):
        unlearn(name, task, *fitted, steps=2)
