"""The diffusion task: its losses by hand, what its keys determine, and methods that run on it."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eupmu_jax import tasks, unlearn
from eupmu_jax.objectives import diffusion
from eupmu_jax.tasks import as_examples
from eupmu_jax.training._aim import aim_of
from eupmu_jax.training._inputs import Sets

SCHEDULE, CLASSES = diffusion.cosine_schedule(100), 3


def denoise(params, x_t, t, labels):
    """A model that is linear in the noised image, with a shift for each condition."""
    return x_t * params["scale"] + params["shift"][labels]


@pytest.fixture
def params():
    rng = np.random.default_rng(0)
    return {"scale": jnp.float32(0.7), "shift": jnp.asarray(rng.normal(size=(CLASSES + 1, 5)), jnp.float32)}


def batch_of(count, seed=0):
    rng = np.random.default_rng(seed)
    inputs = jnp.asarray(rng.uniform(-1, 1, size=(count, 5)), jnp.float32)
    return {"inputs": inputs, "labels": jnp.asarray(rng.integers(CLASSES, size=count))}


def task(**options):
    made = tasks.diffusion(denoise, SCHEDULE, num_conditions=CLASSES, **options)
    return made._replace(outputs=jax.jit(made.outputs))


def test_forget_losses_are_the_distances_to_their_targets(params):
    made, batch = task(), batch_of(8)
    outputs = made.outputs(params, batch, None)
    shift, labels = np.asarray(params["shift"]), np.asarray(batch["labels"])
    by_hand = {
        "unconditional": np.mean((shift[labels] - shift[CLASSES]) ** 2),
        "other_condition": np.mean((shift[labels] - shift[(labels + 1) % CLASSES]) ** 2),
        "negative_guidance": np.mean((2 * (shift[labels] - shift[CLASSES])) ** 2),
    }
    for name, expected in by_hand.items():
        np.testing.assert_allclose(made.forget[name](outputs, batch), expected, rtol=1e-4, err_msg=name)
    assert set(made.forget) == {*by_hand, "random_condition", "noise", "surrogate", "bounded_ascent"}
    wanted, found = (np.asarray(outputs[name]) for name in ("target", "prediction"))
    room = np.maximum(0, np.mean(wanted**2, axis=1) - np.mean((found - wanted) ** 2, axis=1))
    np.testing.assert_allclose(made.forget["bounded_ascent"](outputs, batch), np.mean(room), rtol=1e-4)
    assert float(made.forget["bounded_ascent"](outputs | {"prediction": outputs["target"]}, batch)) > 0.1
    assert float(made.forget["bounded_ascent"](outputs | {"prediction": 0 * outputs["target"]}, batch)) == 0


def test_weights_guidance_and_the_surrogate_follow_their_definitions(params):
    made, batch = task(gamma=5.0, guidance=3.0, prediction="v"), batch_of(8)
    outputs = made.outputs(params, batch, None)
    shift, labels = np.asarray(params["shift"]), np.asarray(batch["labels"])
    times, noises = jax.random.split(jax.random.key(0))
    t, noise = diffusion.stratified_times(times, 8, 100), jax.random.normal(noises, (8, 5))

    def errors(images):
        x_t = diffusion.noised(SCHEDULE, images, t, noise)
        wanted = diffusion.target("v", SCHEDULE, images, t, noise)
        return np.mean((denoise(params, x_t, t, batch["labels"]) - wanted) ** 2, axis=1)

    weights = diffusion.min_snr_weights("v", SCHEDULE, t, 5.0)
    assert np.ptp(weights) > 0.1
    np.testing.assert_allclose(made.error(outputs, batch), weights * errors(batch["inputs"]), rtol=1e-4)
    np.testing.assert_allclose(made.retain(outputs, batch), np.mean(made.error(outputs, batch)), rtol=1e-5)
    guided = np.mean((4 * (shift[labels] - shift[CLASSES])) ** 2)
    np.testing.assert_allclose(made.forget["negative_guidance"](outputs, batch), guided, rtol=1e-4)
    images = jax.random.uniform(jax.random.split(jax.random.fold_in(jax.random.key(0), 1), 4)[1], (8, 5), minval=-1)
    np.testing.assert_allclose(made.forget["surrogate"](outputs, batch), np.mean(errors(images)), rtol=1e-4)


def test_a_random_condition_is_drawn_from_all_other_conditions(params):
    made, batch = task(), batch_of(600)
    outputs = made.outputs(params, batch, jax.random.key(0))
    shift, labels = np.asarray(params["shift"]), np.asarray(batch["labels"])
    offset = np.asarray(outputs["random_condition"] - outputs["unconditional"]) + shift[CLASSES]
    drawn = np.argmin(np.linalg.norm(offset[:, None] - shift[None, :CLASSES], axis=-1), axis=1)
    np.testing.assert_allclose(offset, shift[drawn], atol=1e-5)
    assert np.all(drawn != labels)
    counts = np.bincount((drawn - labels) % CLASSES, minlength=CLASSES)
    assert counts.min(initial=600, where=np.arange(CLASSES) > 0) > 240


def test_the_error_of_unknown_examples_is_that_of_the_mean_prediction_for_other_conditions(params):
    made, batch = task(), batch_of(8)
    errors, passes = made.unknown(params, batch)
    labels, shift = np.asarray(batch["labels"]), np.asarray(params["shift"])
    told = made.outputs(params, batch, None)
    # The mean prediction is easy to write down, since the model is linear in the shift.
    others = (shift[:CLASSES].sum(0) - shift[labels]) / (CLASSES - 1)
    expected = np.mean((np.asarray(told["prediction"]) - shift[labels] + others - np.asarray(told["target"])) ** 2, 1)
    np.testing.assert_allclose(errors, expected, rtol=1e-4)
    assert passes == CLASSES - 1
    assert (
        tasks.diffusion(denoise, SCHEDULE, num_conditions=40).unknown(
            {"scale": 1.0, "shift": jnp.zeros((41, 5))}, batch
        )[1]
        == 16
    )


@pytest.mark.slow
@pytest.mark.parametrize("prediction", diffusion.PREDICTIONS)
def test_the_noise_loss_compares_the_predicted_noise_with_uniform_noise(prediction, params):
    made, batch = task(prediction=prediction), batch_of(6)
    outputs = made.outputs(params, batch, None)
    times, noises = jax.random.split(jax.random.key(0))
    t, noise = diffusion.stratified_times(times, 6, 100), jax.random.normal(noises, (6, 5))
    x_t = diffusion.noised(SCHEDULE, batch["inputs"], t, noise)
    meant = diffusion.epsilon_of(prediction, SCHEDULE, outputs["prediction"], x_t, t)
    uniform = jax.random.uniform(jax.random.split(jax.random.fold_in(jax.random.key(0), 1), 4)[2], (6, 5))
    np.testing.assert_allclose(made.forget["noise"](outputs, batch), np.mean((meant - uniform) ** 2), rtol=1e-4)


@pytest.mark.slow
def test_the_noise_loss_is_finite_under_a_schedule_that_ends_in_pure_noise(params):
    to_nothing = diffusion.Schedule(tuple(np.linspace(0.99, 0, 8).tolist()))
    made, batch = tasks.diffusion(denoise, to_nothing, num_conditions=CLASSES), batch_of(64)
    loss, gradient = jax.value_and_grad(lambda p: made.forget["noise"](made.outputs(p, batch, None), batch))(params)
    chex.assert_tree_all_finite((loss, gradient))
    assert loss < 10


@pytest.mark.slow
def test_no_gradient_flows_through_a_target_and_the_original_may_provide_it(params):
    batch = batch_of(8)
    loss = lambda made: lambda p: made.forget["unconditional"](made.outputs(p, batch, None), batch)
    gradient = jax.grad(loss(task()))(params)
    np.testing.assert_array_equal(gradient["shift"][CLASSES], 0)
    moved = jax.tree.map(lambda leaf: leaf + 1, params)
    frozen = task(original=params).outputs(moved, batch, None)
    np.testing.assert_allclose(frozen["unconditional"], task().outputs(params, batch, None)["unconditional"])


def test_equal_keys_give_equal_noise_and_different_keys_different_noise(params):
    made, batch = task(), batch_of(8)
    outputs = lambda key: made.outputs(params, batch, key)["target"]
    np.testing.assert_array_equal(outputs(jax.random.key(1)), outputs(jax.random.key(1)))
    assert np.any(outputs(jax.random.key(1)) != outputs(jax.random.key(2)))
    np.testing.assert_array_equal(outputs(None), outputs(None))


@pytest.mark.slow
def test_rows_share_noise_and_times_only_between_batches_of_equal_size(params):
    made, key = tasks.diffusion(lambda params, x_t, t, labels: x_t, SCHEDULE, num_conditions=CLASSES), jax.random.key(1)
    # For black images, the target depends only on noise and time.
    black = lambda count: {"inputs": jnp.zeros((count, 5)), "labels": jnp.zeros(count, int)}
    target = lambda count, label: made.outputs(params, black(count) | {"labels": jnp.full(count, label)}, key)["target"]
    np.testing.assert_array_equal(target(8, 0), target(8, 1))
    assert np.any(target(8, 0) != target(16, 0)[:8])


@pytest.mark.slow
def test_dropped_conditions_count_only_in_the_retain_loss(params):
    made, batch = task(dropout=0.5), batch_of(64)
    outputs = made.outputs(params, batch, jax.random.key(0))
    left_out = np.asarray(outputs["counts"]) == 0
    assert 0.3 < left_out.mean() < 0.7
    other = outputs | {"prediction": jnp.where(left_out[:, None], 9.0, outputs["prediction"])}
    for name in set(made.forget) - {"surrogate"}:
        np.testing.assert_array_equal(made.forget[name](outputs, batch), made.forget[name](other, batch))
    assert made.retain(outputs, batch) != made.retain(other, batch)
    assert np.all(np.asarray(made.outputs(params, batch, None)["counts"]) == 1)


@pytest.fixture(scope="module")
def trained():
    """Parameters that denoise well, trained by gradient descent."""
    made, batch = task(), batch_of(64, seed=1)
    start = {"scale": jnp.float32(0.0), "shift": jnp.zeros((CLASSES + 1, 5))}

    def step(params, key):
        gradient = jax.grad(lambda p: made.retain(made.outputs(p, batch, key), batch))(params)
        return jax.tree.map(lambda leaf, slope: leaf - 0.3 * slope, params, gradient), None

    return jax.lax.scan(step, start, jax.random.split(jax.random.key(0), 200))[0]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["weighted sum", "EUPMU", "SCRUB"])
def test_methods_run_on_the_diffusion_task(method, trained):
    forget, retain, held_out = (batch_of(count, seed) for count, seed in ((16, 0), (64, 1), (64, 2)))
    result = unlearn(method, task(), trained, forget, retain, held_out, steps=5, probes=1)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result.params))
    assert result.figures["returned"]["retain_loss"] < 1.1 * result.figures["original"]["retain_loss"]


@pytest.mark.slow
def test_without_unseen_data_bringing_retained_conditions_to_the_level_of_unknown_ones_is_warned_about(params, caplog):
    unlearn("EUPMU", task(), params, batch_of(8), batch_of(16), steps=1, probes=0)
    assert "does not know the conditions of the forget set, although the retain set has some of them" in caplog.text


@pytest.mark.slow
def test_a_condition_absent_from_the_retain_set_is_forgotten_entirely_whatever_is_held_out(params):
    made = task()
    of = lambda count, seed, *labels: batch_of(count, seed) | {"labels": np.resize(labels, count)}
    sets = of(40, 0, 0), of(60, 1, 1, 2), of(60, 2, 0, 1, 2)
    level = unlearn("EUPMU", made, params, *sets, steps=1, settings={"learning_rate": 1e-12}).level
    errors, _ = made.unknown(params, sets[0])
    assert level.target == pytest.approx(float(np.mean(errors)), rel=1e-5)
    # BUG: the target was said to be that of unseen data, with an interval, though none of them has a part in it.
    assert (level.source, level.interval, level.comparison) == ("unknown", None, None)
    assert level.unseen is not None
    # The step changes nothing, so the error does not rise, whatever the noise of a batch.
    assert level.retain_error == pytest.approx(level.start, rel=1e-5)


@pytest.mark.parametrize(
    ("forgotten", "held_out", "at_least"),
    [
        ([0], None, True),
        ([0], [0, 1, 2], True),
        ([0, 1], None, False),
        ([0, 1], [0, 1, 2], False),
        ([1], [1, 2], False),
    ],
)
def test_a_run_may_exceed_its_target_where_all_conditions_are_to_be_forgotten(forgotten, held_out, at_least, params):
    of = lambda labels: as_examples("set", batch_of(30) | {"labels": np.resize(labels, 30)})
    sets = Sets(of(forgotten), of([1, 2]), None)
    unseen = None if held_out is None else of(held_out)
    assert aim_of(task(), params, sets, unseen, None).at_least is at_least


def test_if_every_condition_was_dropped_each_example_still_has_its_error(params):
    made, batch = task(), batch_of(6)
    outputs = made.outputs(params, batch, None)
    none = outputs | {"counts": jnp.zeros(6)}
    np.testing.assert_array_equal(made.error(none, batch), made.error(outputs, batch))
    assert jnp.all(made.error(none, batch) > 0)


def test_passes_that_measure_unknown_examples_are_counted_with_those_over_unseen_data(params):
    of = lambda *labels: as_examples("set", batch_of(30) | {"labels": np.resize(labels, 30)})
    aim = aim_of(task(), params, Sets(of(0), of(1, 2), None), of(0, 1, 2), None)
    # In addition to the 30 unseen examples, each of 30 forgotten ones under both other conditions.
    assert aim.passes == 30 + 2 * 30
