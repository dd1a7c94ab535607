import pytest

from eupmu_jax.methods.augmented_lagrangian import DEFAULT_RISE, augmented_lagrangian


@pytest.mark.parametrize("penalty", [5.0, 50.0])
@pytest.mark.parametrize("allowed_rise", [0.1, None])
def test_the_retain_loss_ends_at_the_limit(rise_of_one_logit, penalty, allowed_rise):
    settings = {"learning_rate": 1.0, "penalty": penalty}
    settings |= {} if allowed_rise is None else {"allowed_rise": allowed_rise}
    rise = rise_of_one_logit(augmented_lagrangian, settings, 3_000)
    assert rise == pytest.approx(allowed_rise or DEFAULT_RISE, rel=0.02)
