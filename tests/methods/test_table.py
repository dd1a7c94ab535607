"""What every method of the table has in common."""

import collections

import chex
import jax
import numpy as np
import pytest

from eupmu_jax import methods
from eupmu_jax.methods import METHODS, Choice, LogUniform

FORGET_BATCH, RETAIN_BATCH = 32, 128  # of the fixture
STEPS = 5
# The counter does not see the passes that differentiate a gradient once more.
SECOND_ORDER = {"OFMU"}


def settings_of(space, factor=1.0):
    """The middle of the space, times a factor where it is continuous."""
    middle = lambda part: part.options[0] if isinstance(part, Choice) else factor * (part.low * part.high) ** 0.5
    return {name: middle(part) for name, part in space.items()}


@pytest.fixture(scope="module")
def counted(problem):
    """The problem, and the examples that passed through its model forward and backward, as they really run."""
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
    original = problem.problem.apply
    apply = lambda params, images: mark(original(params, images))
    return problem._replace(problem=problem.problem._replace(apply=apply)), passes


@pytest.mark.parametrize("name", METHODS)
def test_three_dimensions_are_searched(name):
    space = METHODS[name].space
    assert len(space) == 3
    assert "learning_rate" in space
    for part in space.values():
        if isinstance(part, LogUniform):
            assert 0 < part.low < part.high
        else:
            assert len(set(part.options)) == len(part.options) > 1
            assert len({isinstance(option, str) for option in part.options}) == 1


@pytest.mark.parametrize("name", METHODS)
def test_the_contract(name, counted):
    problem, passes = counted
    method = METHODS[name]
    before = jax.tree.map(np.array, problem.params)
    traces = sum(problem.traces.values())
    settings = settings_of(method.space)
    passes.clear()
    params = problem.run(method.make, settings, steps=STEPS)
    jax.effects_barrier()
    seen = dict(passes)
    chex.assert_trees_all_equal_shapes_and_dtypes(params, problem.params)
    chex.assert_tree_all_finite(params)
    again, other = (problem.run(method.make, settings_of(method.space, factor), steps=STEPS) for factor in (1.0, 1.1))
    chex.assert_trees_all_equal(params, again)
    assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(other), strict=True))
    chex.assert_trees_all_equal(problem.params, before)
    assert sum(problem.traces.values()) == traces + 1, "recompiled between steps, or between runs with other numbers"

    cost = method.make(problem.problem._replace(steps=STEPS), settings).cost
    examples = lambda part, outside: STEPS * (part[0] * FORGET_BATCH + part[1] * RETAIN_BATCH) + outside
    declared = {
        "forward": examples(cost.forward, cost.outside_forward),
        "backward": examples(cost.backward, cost.outside_backward),
    }
    measured = {kind: seen.get(kind, 0) for kind in declared}
    if name in SECOND_ORDER:
        assert all(0 < measured[kind] <= declared[kind] for kind in declared)
    else:
        assert measured == pytest.approx(declared)


def test_every_string_of_a_choice_is_known(problem):
    for method in METHODS.values():
        for name, part in method.space.items():
            if isinstance(part, Choice) and isinstance(part.options[0], str):
                for option in part.options:
                    method.make(problem.problem._replace(steps=2), settings_of(method.space) | {name: option})


def test_an_unknown_method_lists_the_known():
    with pytest.raises(ValueError, match=r"^method: got 'magic', expected one of fine-tuning, "):
        methods.method("magic")
