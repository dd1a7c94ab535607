"""What designs promise: no method makes more passes than plain steps do, whatever it makes them for."""

import re

import numpy as np
import pytest

from eupmu_jax import data, methods
from eupmu_jax.benchmark import designs, problems
from eupmu_jax.training.unlearning import Plan, affordable_steps

EXAMPLES = {"fashion_mnist": 60_000, "cifar10": 50_000, "digits": 1_437}


@pytest.fixture(scope="module")
def digits():
    return problems.make("digits", "random:10%", 0)


def with_split(digits, name, setting):
    """A task of the size of the design's: what counts here is how many examples there are."""
    design = designs.design(name)
    labels = np.arange(design.size or EXAMPLES[design.data]) % 10
    return digits._replace(split=data.split(labels, setting.of(0), num_classes=10, seed=0))


def settings_of(method):
    first = lambda part: part.options[0] if isinstance(part, methods.Choice) else part.low
    return {key: first(part) for key, part in methods.METHODS[method].space.items()} | {"optimizer": "adam"}


@pytest.mark.parametrize("name", designs.DESIGNS)
@pytest.mark.parametrize("method", methods.METHODS)
def test_every_method_makes_as_many_steps_as_the_passes_of_plain_ones_pay_for(digits, name, method):
    for setting in designs.design(name).settings:
        made = with_split(digits, name, setting)
        settings, sizes = settings_of(method), (setting.forget_batch, setting.retain_batch)
        counts = len(made.split.forget_ids), len(made.split.retain_ids)
        allowed = 3 * setting.steps * sum(sizes)
        steps = affordable_steps(method, settings, Plan(setting.steps, *sizes), made)
        problem = methods.Problem(made.apply, made.fresh_params, 10, *counts, steps, 0.0, allowed)
        assert 1 <= steps <= setting.steps
        assert passes(method, settings, problem, sizes) <= allowed
        more = passes(method, settings, problem._replace(steps=steps + 1), sizes)
        assert steps == setting.steps or more > allowed


def passes(method, settings, problem, sizes):
    cost = methods.method(method).make(problem, settings).cost
    forward, backward = (np.dot(part, sizes) for part in (cost.forward, cost.backward))
    return problem.steps * (forward + 2 * backward) + cost.outside_forward + 2 * cost.outside_backward


SALUN = "plan: got 2 steps of 16 + 48 examples, which are 384 passes, expected at least 624, which SalUn makes"
INFLUENCE = "passes: got 384, expected at least 564, of which the gradient of the 144 forget examples takes 432"


@pytest.mark.parametrize(("method", "message"), [("SalUn", SALUN), ("influence", INFLUENCE)])
def test_a_plan_that_pays_for_no_step_is_refused(digits, method, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        affordable_steps(method, settings_of(method), Plan(2, 16, 48), digits)
