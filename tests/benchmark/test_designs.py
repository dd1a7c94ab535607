"""Designs give every method the same pass budget, that of plain steps, whatever it spends the passes on."""

import re

import numpy as np
import pytest

from eupmu_jax import data, methods
from eupmu_jax.benchmark import designs, problems
from eupmu_jax.methods.passes import affordable_steps

EXAMPLES = {"fashion_mnist": 60_000, "cifar10": 50_000, "digits": 1_437, "emoji_32": 3_082}


@pytest.fixture(scope="module")
def digits():
    return problems.make("digits", "random:10%", 0)


def counts_of(design, case):
    """The numbers of examples in the forget set and in the retain set."""
    labels = np.arange(design.size or EXAMPLES[design.data] - design.held_out) % 10
    split = data.split(labels, case.of(0), num_classes=10, seed=0)
    return len(split.forget_ids), len(split.retain_ids)


def settings_of(method):
    first = lambda part: part.options[0] if isinstance(part, methods.Choice) else part.low
    return {key: first(part) for key, part in methods.METHODS[method].space.items()} | {"target": 0.1}


@pytest.mark.parametrize("name", designs.DESIGNS)
@pytest.mark.parametrize("method", methods.METHODS)
def test_every_method_takes_as_many_steps_as_fit_the_pass_budget(digits, name, method):
    design = designs.design(name)
    for case in design.cases:
        counts, sizes = counts_of(design, case), (case.forget_batch, case.retain_batch)
        settings, allowed = settings_of(method), 3 * case.steps * sum(sizes)
        steps = affordable_steps(method, settings, digits.task, counts, case.steps, sizes, design.held_out)
        allowed -= design.held_out if methods.METHODS[method].steers else 0
        allowed -= design.held_out + counts[0] if methods.METHODS[method].transports else 0
        terms = methods.Terms(*counts, steps, 0.0, allowed)
        assert 1 <= steps <= case.steps
        assert passes(method, digits.task, terms, settings, sizes) <= allowed
        more = passes(method, digits.task, terms._replace(steps=steps + 1), settings, sizes)
        assert steps == case.steps or more > allowed


def passes(method, task, terms, settings, sizes):
    cost = methods.method(method).make(task, terms, settings).cost
    forward, backward = (np.dot(part, sizes) for part in (cost.forward, cost.backward))
    return terms.steps * (forward + 2 * backward) + cost.outside_forward + 2 * cost.outside_backward


SALUN = "steps: got 2 of 16 + 48 examples, a budget of 384 passes, expected at least 624, which a single step"
INFLUENCE = "steps: got a run of 384 passes, expected at least 564, of which the gradient of the 144 forget examples"


@pytest.mark.parametrize(("method", "message"), [("SalUn", SALUN), ("influence", INFLUENCE)])
def test_a_budget_too_small_for_a_single_step_is_refused(digits, method, message):
    counts = len(digits.forget), len(digits.retain)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        affordable_steps(method, settings_of(method), digits.task, counts, 2, (16, 48))
