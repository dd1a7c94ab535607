"""Optimizer settings that a method does not read change nothing, and a warning names them."""

import itertools

import chex
import jax
import jax.numpy as jnp
import pytest

from eupmu_jax.methods import METHODS, default_settings
from eupmu_jax.methods.method import OPTIMIZER_SETTINGS
from eupmu_jax.tasks import classification
from eupmu_jax.training.unlearning import unlearn

pytestmark = pytest.mark.slow

TASK = classification(lambda params, inputs: inputs @ params, num_classes=2)
INPUTS = jax.random.normal(jax.random.key(0), (24, 3))
DATA = {"inputs": INPUTS, "labels": (INPUTS[:, 0] > 0).astype(int)}
FORGET, RETAIN = ({name: leaf[part] for name, leaf in DATA.items()} for part in (slice(8), slice(8, None)))
UNSEEN = {"inputs": -jax.random.normal(jax.random.key(1), (600, 3)), "labels": jnp.arange(600) % 2}
GIVEN = {"optimizer": "sgd", "momentum": 0.5, "weight_decay": 0.5}
FEWER = {name: method for name, method in METHODS.items() if method.optimizer_settings != OPTIMIZER_SETTINGS}


def run(method, settings):
    start = 0.3 * jnp.ones((3, 2)).at[0, 1].set(2.0)
    sizes = {"steps": 3, "forget_batch": 8, "retain_batch": 16, "probes": 0}
    held_out = UNSEEN if METHODS[method].transports else None
    return unlearn(method, TASK, start, FORGET, RETAIN, held_out, settings=settings, **sizes).params


def test_only_five_methods_read_fewer_settings():
    assert set(FEWER) == {"influence", "OFMU", "ZO-signGD", "NGDiff", "EUPMU transport"}


@pytest.mark.parametrize(("method", "name"), itertools.product(FEWER, GIVEN))
def test_a_setting_that_is_not_read_changes_nothing_and_is_warned_about(method, name, caplog):
    plain = default_settings(METHODS[method], TASK)
    without = run(method, plain)
    caplog.clear()
    changed = run(method, plain | {name: GIVEN[name]})
    if name in FEWER[method].optimizer_settings:
        assert not caplog.messages
        assert not jnp.array_equal(changed, without)
    else:
        chex.assert_trees_all_equal(changed, without)
        assert caplog.messages == [f"settings: got {name}, which {method} ignores"]


def test_a_method_that_reads_all_settings_gives_no_warning(caplog):
    run("fine-tuning", default_settings(METHODS["fine-tuning"], TASK) | GIVEN)
    assert not caplog.messages
