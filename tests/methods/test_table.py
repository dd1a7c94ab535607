"""The contract of every method in the table, on a classifier."""

import collections

import chex
import jax
import numpy as np
import pytest

from eupmu_jax import methods
from eupmu_jax.methods import METHODS, Choice, LogUniform
from eupmu_jax.methods.aggregated import FAMILY
from eupmu_jax.tasks import classification
from eupmu_jax.training.unlearning import unlearn

# The counter misses passes that differentiate a gradient again.
SECOND_ORDER = {"OFMU"}


def settings_of(space, factor=1.0):
    """The middle of the search space, times a factor along continuous dimensions."""
    middle = lambda part: part.options[0] if isinstance(part, Choice) else factor * (part.low * part.high) ** 0.5
    return {name: middle(part) for name, part in space.items()} | {"optimizer": "sgd"}


@pytest.fixture(scope="module")
def counted(digits):
    """The digits, and a counter of the examples that pass through the model and, under `traces`, of its traces."""
    passes = collections.Counter()

    def count(kind, examples):
        jax.debug.callback(lambda: passes.update({kind: examples}))

    @jax.custom_vjp
    def mark(logits):
        count("forward", len(logits))
        return logits

    def forward(logits):
        count("forward", len(logits))
        return logits, None

    def backward(_, cotangent):
        count("backward", len(cotangent))
        return (cotangent,)

    mark.defvjp(forward, backward)

    def apply(params, inputs):
        passes["traces"] += 1
        return mark(digits.task.outputs(params, {"inputs": inputs}, None))

    task = classification(apply, num_classes=10, fresh_params=digits.task.fresh_params)
    return digits._replace(task=task), passes


@pytest.mark.parametrize("name", METHODS)
def test_three_dimensions_are_searched(name):
    space = METHODS[name].space
    assert len(space) == 3
    # The length of a path is the learning rate times the steps.
    assert {"learning_rate", "length"} & set(space)
    for part in space.values():
        if isinstance(part, LogUniform):
            assert 0 < part.low < part.high
        else:
            assert len(set(part.options)) == len(part.options) > 1
            assert len({isinstance(option, str) for option in part.options}) == 1


# All aggregators come from one function and differ in a setting of their own, if they have one.
ALIKE = [name for name, method in METHODS.items() if method.family == FAMILY and name != "mean"]
PLAIN = [name for name in ALIKE if METHODS[name].space == METHODS["mean"].space]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in ALIKE)) for name in METHODS if name not in PLAIN],
)
def test_the_contract(name, counted):
    digits, passes = counted
    passes.clear()
    before, traces = jax.tree.map(np.array, digits.params), []

    def run(factor=1.0):
        return unlearn(
            name,
            digits.task,
            digits.params,
            digits.forget,
            digits.retain,
            steps=5,
            settings=settings_of(METHODS[name].space, factor),
            forget_batch=32,
            retain_batch=128,
            probes=0,
            start={"retain_loss": 0.03, "retain_error": 0.01},
            on_step=lambda: traces.append(passes["traces"]),
        )

    result = run()
    jax.effects_barrier()
    seen = {kind: passes[kind] for kind in ("forward", "backward")}
    chex.assert_trees_all_equal_shapes_and_dtypes(result.params, digits.params)
    chex.assert_tree_all_finite(result.params)
    again, other = run().params, run(1.1).params
    chex.assert_trees_all_equal(result.params, again)
    assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(other), strict=True))
    chex.assert_trees_all_equal(digits.params, before)
    assert result.share is None or 0 <= result.share <= 1
    assert len(traces) == 15
    if name != "influence":
        assert traces[0] > 0
    # If the method has a measured end, it is traced after the last step of the first run.
    assert len(set(traces[:5])) == 1, "recompiled between steps"
    assert len(set(traces[5:])) == 1, "recompiled in runs with other numbers"

    declared = {"forward": result.forward, "backward": result.backward}
    if name in SECOND_ORDER:
        assert all(0 < seen[kind] <= declared[kind] for kind in declared)
    else:
        assert seen == declared, f"{name}: METHOD.make(...).cost declares other passes; under vmap, one is counted"


def test_every_string_option_of_a_choice_is_accepted(digits):
    for method in METHODS.values():
        for name, part in method.space.items():
            if isinstance(part, Choice) and isinstance(part.options[0], str):
                for option in part.options:
                    method.make(digits.task, digits.terms(2), settings_of(method.space) | {"target": 0.1, name: option})


def test_the_error_for_an_unknown_method_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"^method: got 'magic', expected one of EUPMU, fine-tuning, "):
        methods.method("magic")


def test_only_settings_that_name_losses_select_losses():
    # BUG: a forget loss named like the value of another setting, such as "sgd", was selected too.
    named = lambda name: lambda outputs, batch: outputs.mean()
    task = classification(lambda params, inputs: inputs @ params, 3)._replace(
        forget={"ascent": named(1), "sgd": named(2)}
    )
    settings = {"forget_objective": "ascent", "optimizer": "sgd"}
    assert METHODS["weighted sum"].losses(task, settings) == ["ascent"]
