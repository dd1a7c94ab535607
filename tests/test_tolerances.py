import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eupmu_jax import tolerances
from eupmu_jax.tolerances import as_tolerance, budget, constant, evaluate, relative, resolve_num_objectives, schedule

LOSSES = jnp.array([9.0, 1.0, 2.0])


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (0.5, [0.5, 0.5]),
        (np.array([0.1, 0.2]), [0.1, 0.2]),
        (lambda count: 0.25 * count, [1.0, 1.0]),
        (lambda count: jnp.array([0.0, 1.0]) * count, [0.0, 4.0]),
        (constant(2.0), [2.0, 2.0]),
        (schedule(lambda count: 0.25 * count), [1.0, 1.0]),
        (relative(0.1), [0.1, 0.2]),
        (relative(np.array([0.1, 1.0])), [0.1, 2.0]),
        (budget(1.5, rate=10.0), [5.0, -5.0]),
        (budget(np.array([1.0, 4.0]), rate=10.0), [0.0, 20.0]),
    ],
)
def test_the_tolerance_of_a_step(rule, expected):
    epsilon = jax.jit(lambda count, losses: evaluate(as_tolerance(rule), count, losses, 2, jnp.float32))(4, LOSSES)
    assert epsilon.dtype == jnp.float32
    np.testing.assert_allclose(epsilon, expected, rtol=1e-6)


@pytest.mark.parametrize("rule", [constant, relative, lambda value: budget(value, 1.0)])
@pytest.mark.parametrize("value", [-1.0, float("nan"), np.array([0.1, -0.1])])
def test_negative_and_nan_are_refused(rule, value):
    with pytest.raises(ValueError, match=r"^tolerance: got"):
        rule(value)


def test_a_budget_needs_a_positive_rate():
    # BUG: a negative rate turns the barrier into its opposite, and 0 into a tolerance of 0; both pass.
    for rate in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="rate"):
            budget(1.0, rate)


@pytest.mark.parametrize("name", ["relative", "budget"])
def test_rules_that_read_losses_say_so(name):
    rule = {"relative": relative(0.1), "budget": budget(1.0, 1.0)}[name]
    with pytest.raises(ValueError, match=f"^losses: got None, but the tolerance '{name}'"):
        rule.evaluate(0, None)


@pytest.mark.parametrize("rule", [tolerances.constant(np.ones(3)), schedule(lambda count: jnp.ones(3))])
def test_as_many_values_as_constraints(rule):
    with pytest.raises(ValueError, match=r"^tolerance: got shape \(3,\), expected a scalar or \(2,\)"):
        evaluate(rule, 0, LOSSES, 2, jnp.float32)


def test_the_number_of_objectives_comes_from_whatever_tells_it():
    assert resolve_num_objectives(None) is None
    assert resolve_num_objectives(3) == 3
    assert resolve_num_objectives(None, None, 2) == 3
    assert resolve_num_objectives(3, 2) == 3
    with pytest.raises(ValueError, match="got 3 values, expected 2"):
        resolve_num_objectives(None, 2, 3)
    with pytest.raises(ValueError, match="K >= 2"):
        resolve_num_objectives(1)
