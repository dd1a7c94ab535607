import numpy as np
import pytest

from eupmu_jax.methods.augmented_lagrangian import augmented_lagrangian
from eupmu_jax.methods.quadratic_penalty import quadratic_penalty


def test_the_retain_loss_ends_above_the_limit_by_less_for_a_larger_penalty(rise_of_one_logit):
    low, high = (
        rise_of_one_logit(quadratic_penalty, {"learning_rate": 1.0, "penalty": penalty, "allowed_rise": 0.1}, 60)
        for penalty in (3.0, 30.0)
    )
    assert 0 < high - 0.1 < 0.5 * (low - 0.1)


@pytest.mark.parametrize("method", [quadratic_penalty, augmented_lagrangian])
def test_a_loose_limit_has_no_effect(rise_of_one_logit, method):
    """Below the limit the multiplier is 0, and the forget objective reaches its minimum at a logit of 0."""
    rise = rise_of_one_logit(method, {"learning_rate": 1.0, "penalty": 10.0, "allowed_rise": 2.0}, 300)
    assert rise == pytest.approx(np.log(2) - np.log1p(np.exp(-4.0)), abs=1e-3)


@pytest.mark.parametrize("name", ["quadratic penalty", pytest.param("augmented Lagrangian", marks=pytest.mark.slow)])
def test_digits_are_forgotten_near_the_limit(digits, name):
    settings = {"learning_rate": 0.5, "forget_objective": "bounded_ascent", "penalty": 100.0, "allowed_rise": 0.02}
    params = digits.run(name, settings, steps=60)
    assert digits.accuracy(params, digits.forget) < 0.1
    assert digits.accuracy(params, digits.retain) > 0.97
    assert digits.loss(params, digits.retain) < digits.loss(digits.params, digits.retain) + 0.04
