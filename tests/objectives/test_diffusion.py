"""Schedules against published values, and identities between the predictions of diffusion models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eupmu_jax.objectives import diffusion

SCHEDULES = {"linear": diffusion.linear_schedule(), "cosine": diffusion.cosine_schedule()}


def images(seed, count=6):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=(count, 4, 4, 1)), jnp.float32) for _ in range(3))


def test_the_linear_schedule_is_that_of_ddpm():
    # After 1,000 steps from 1e-4 to 0.02, 4.0358e-05 of the signal is left, and half of it near step 260.
    left = np.array(SCHEDULES["linear"].alpha_bar)
    np.testing.assert_allclose([left[0], left[-1]], [0.9999, 4.0358e-05], rtol=1e-4)
    assert abs(int(np.argmax(left < 0.5)) - 260) <= 5


def test_the_cosine_schedule_follows_its_formula_where_no_variance_is_clipped():
    steps, f = 1_000, lambda t: np.cos((t / 1_000 + 0.008) / 1.008 * np.pi / 2) ** 2
    expected = [f(t) / f(0) for t in (1, 250, 500, 900)]
    np.testing.assert_allclose([SCHEDULES["cosine"].alpha_bar[t - 1] for t in (1, 250, 500, 900)], expected, rtol=1e-6)
    left = np.array(SCHEDULES["cosine"].alpha_bar)
    assert SCHEDULES["cosine"].steps == steps
    assert np.all(np.diff(left) < 0)
    np.testing.assert_allclose(1 - left[-1] / left[-2], 0.999, rtol=1e-6)


@pytest.mark.parametrize("name", list(SCHEDULES))
@given(seed=st.integers(0, 99), at=st.integers(0, 899))
def test_every_prediction_type_gives_the_same_image_and_noise(name, seed, at):
    schedule, (x, noise, _) = SCHEDULES[name], images(seed)
    t = jnp.full(len(x), at)
    x_t = diffusion.noised(schedule, x, t, noise)
    for prediction in diffusion.PREDICTIONS:
        perfect = diffusion.target(prediction, schedule, x, t, noise)
        # Where little is left of either, recovering it divides by a small number.
        a, s = (float(part.ravel()[0]) for part in schedule.at(t, 4))
        np.testing.assert_allclose(diffusion.x_of(prediction, schedule, perfect, x_t, t), x, atol=2e-6 / a)
        np.testing.assert_allclose(diffusion.epsilon_of(prediction, schedule, perfect, x_t, t), noise, atol=2e-6 / s)


@given(seed=st.integers(0, 99), at=st.integers(20, 899))
def test_losses_of_epsilon_v_and_x_agree_after_conversion(seed, at):
    schedule, (x, noise, wrong) = SCHEDULES["cosine"], images(seed)
    t = jnp.full(len(x), at)
    x_t = diffusion.noised(schedule, x, t, noise)
    found = {}
    for prediction in diffusion.PREDICTIONS:
        # The same wrong noise, expressed in each prediction type.
        predicted = diffusion.target(prediction, schedule, diffusion.x_of("epsilon", schedule, wrong, x_t, t), t, wrong)
        errors = diffusion.squared_errors(predicted, diffusion.target(prediction, schedule, x, t, noise))
        found[prediction] = diffusion.min_snr_weights(prediction, schedule, t) * errors
    np.testing.assert_allclose(found["v"], found["epsilon"], rtol=2e-3)
    np.testing.assert_allclose(found["x"], found["epsilon"], rtol=2e-3)


@settings(max_examples=20)
@given(seed=st.integers(0, 999), count=st.sampled_from([1, 7, 64]), steps=st.sampled_from([2, 50, 1_000]))
def test_there_is_a_time_in_every_stratum(seed, count, steps):
    times = np.sort(diffusion.stratified_times(jax.random.key(seed), count, steps))
    assert times.min() >= 0
    assert times.max() < steps
    parts = np.arange(count) * steps / count
    assert np.all(times >= np.floor(parts))
    assert np.all(times <= parts + steps / count)


def test_negative_guidance_of_zero_is_the_unconditional_target_and_guidance_of_zero_the_conditional():
    conditional, unconditional, _ = images(0)
    np.testing.assert_array_equal(diffusion.negative_guidance(conditional, unconditional, 0.0), unconditional)
    np.testing.assert_array_equal(diffusion.guided(conditional, unconditional, 0.0), conditional)
    # ESD reverses the guidance used in sampling.
    np.testing.assert_allclose(
        diffusion.negative_guidance(conditional, unconditional, 2.0),
        diffusion.guided(conditional, unconditional, -3.0),
        rtol=1e-5,
        atol=1e-5,
    )


def test_unknown_names_are_reported():
    with pytest.raises(ValueError, match="prediction: got 'noise', expected one of epsilon, v, x"):
        diffusion.target("noise", SCHEDULES["linear"], *images(0)[:1], jnp.zeros(6, int), images(0)[1])
    with pytest.raises(ValueError, match="steps: got 1, expected an int of at least 2"):
        diffusion.linear_schedule(1)


def test_errors_of_half_precision_inputs_are_finite_and_float32():
    # BUG: the square of 300 overflowed in float16.
    errors = diffusion.squared_errors(jnp.full((1, 2), 300.0, jnp.float16), jnp.zeros((1, 2), jnp.float16))
    assert errors.dtype == jnp.float32
    assert errors.tolist() == [90_000.0]
    with pytest.raises(ValueError, match=r"^predicted: got shape \(4, 1\)"):
        diffusion.squared_errors(jnp.ones((4, 1)), jnp.ones(4))


def test_min_snr_weights_are_finite_where_nothing_is_left_of_the_image():
    # BUG: 0 / 0 for predicted noise.
    schedule = diffusion.Schedule((0.5, 0.0))
    found = [float(diffusion.min_snr_weights(name, schedule, jnp.array([1]))[0]) for name in ("epsilon", "v", "x")]
    assert found == [1.0, 0.0, 0.0]


def test_a_signal_that_float32_rounds_to_0_counts_as_none():
    # BUG: 1e-40, which is subnormal, passed, but XLA flushes it to 0, and the image was infinite.
    for last in (1e-60, 1e-40):
        with pytest.raises(ValueError, match=r"^schedule: got alpha_bar that ends at 0"):
            diffusion.check_fit("epsilon", diffusion.Schedule((0.5, last)))
    diffusion.check_fit("epsilon", diffusion.Schedule((0.5, 2e-38)))
    with pytest.raises(ValueError, match=r"^schedule: got alpha_bar that begins at 1"):
        diffusion.check_fit("x", diffusion.Schedule((1 - 1e-12, 0.5)))


def test_few_steps_of_the_linear_schedule_leave_something_of_the_image():
    left = np.array(diffusion.linear_schedule(10).alpha_bar)
    np.testing.assert_allclose(left[-1] / left[-2], 1e-3, rtol=1e-6)
    diffusion.check_fit("epsilon", diffusion.linear_schedule(10))


def test_times_are_in_random_order():
    times = np.asarray(diffusion.stratified_times(jax.random.key(0), 64, 1_000))
    assert abs(np.corrcoef(np.arange(64), times)[0, 1]) < 0.5


@pytest.mark.parametrize("shares", [(1.1, 0.5), (0.5, -0.1), (0.5, 0.5), (0.5, float("nan"))])
def test_what_is_left_of_the_image_must_decrease_within_0_and_1(shares):
    with pytest.raises(ValueError, match=r"^schedule: got alpha_bar outside \[0, 1\] or not decreasing"):
        diffusion.check_fit("v", diffusion.Schedule(shares))
