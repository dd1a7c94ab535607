import numpy as np
import pytest

from eupmu_jax.methods.augmented_lagrangian import DEFAULT_RISE, augmented_lagrangian


@pytest.mark.parametrize("penalty", [5.0, 50.0])
@pytest.mark.parametrize("allowed_rise", [0.1, None])
def test_the_retain_loss_ends_at_the_limit(rise_of_one_logit, penalty, allowed_rise):
    settings = {"learning_rate": 1.0, "penalty": penalty}
    settings |= {} if allowed_rise is None else {"allowed_rise": allowed_rise}
    rise = rise_of_one_logit(augmented_lagrangian, settings, 3_000)
    assert rise == pytest.approx(allowed_rise or DEFAULT_RISE, rel=0.02)


def test_a_loose_limit_is_not_felt(rise_of_one_logit):
    """Below it the multiplier is 0, and the forget objective reaches its minimum, a logit of 0."""
    rise = rise_of_one_logit(augmented_lagrangian, {"learning_rate": 1.0, "penalty": 10.0, "allowed_rise": 2.0}, 300)
    assert rise == pytest.approx(np.log(2) - np.log1p(np.exp(-4.0)), abs=1e-3)


@pytest.mark.slow
def test_digits_are_forgotten_near_the_limit(digits):
    settings = {"learning_rate": 0.5, "forget_objective": "bounded_ascent", "penalty": 100.0, "allowed_rise": 0.02}
    params = digits.run("augmented Lagrangian", settings, steps=60)
    assert digits.accuracy(params, digits.forget) < 0.1
    assert digits.accuracy(params, digits.retain) > 0.97
    assert digits.loss(params, digits.retain) < digits.loss(digits.params, digits.retain) + 0.04
