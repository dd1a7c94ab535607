"""Batches, options and models that the diffusion task refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eupmu_jax import tasks, unlearn
from eupmu_jax.objectives import diffusion

from .test_diffusion import CLASSES, SCHEDULE, batch_of, denoise, task


@pytest.fixture
def params():
    rng = np.random.default_rng(0)
    return {"scale": jnp.float32(0.7), "shift": jnp.asarray(rng.normal(size=(CLASSES + 1, 5)), jnp.float32)}


def data_of_others(data):
    return data | {"inputs": -data["inputs"]}


@pytest.mark.slow
def test_latents_are_accepted_if_images_are_unbounded(params):
    latents = batch_of(8) | {"inputs": 3 * np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)}
    begin = lambda made, data: unlearn("weighted sum", made, params, data, data_of_others(data), steps=2)
    with pytest.raises(ValueError, match=r"^forget: inputs: got images from .* task with bounded=False"):
        begin(task(), latents)
    assert begin(task(bounded=False), latents).history["step"][-1] == 2
    with pytest.raises(ValueError, match="expected finite ones"):
        begin(task(bounded=False), latents | {"inputs": np.full((8, 5), np.nan, np.float32)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction": "noise"}, "prediction: got 'noise', expected one of epsilon, v, x"),
        ({"num_conditions": 1}, "num_conditions: got 1, expected an int of at least 2"),
        ({"dropout": 1.0}, r"dropout: got 1.0, expected a share in \[0, 1\)"),
        ({"gamma": -1.0}, "gamma: got -1.0, expected a number above 0, or None for equal weights"),
        ({"gamma": 0.0}, "gamma: got 0.0"),
        ({"gamma": float("nan")}, "gamma: got nan"),
        ({"gamma": float("inf")}, "gamma: got inf, expected a finite number"),
        ({"denoise": None}, "denoise: got None, expected a function"),
        ({"fresh_params": 3}, "fresh_params: got 3, expected a function of a key, or None"),
        (
            {"schedule": diffusion.Schedule((0.5, 0.0)), "prediction": "epsilon"},
            "schedule: got alpha_bar that ends at 0, where epsilon says nothing of the image; expected prediction 'v'",
        ),
        (
            {"schedule": diffusion.Schedule((1.0, 0.5)), "prediction": "x"},
            "schedule: got alpha_bar that begins at 1, where x says nothing of the noise; expected prediction 'v'",
        ),
        ({"schedule": diffusion.Schedule((0.5, 0.6))}, "schedule: got alpha_bar outside"),
        (
            {"schedule": diffusion.Schedule((0.5, 1e-50)), "prediction": "epsilon"},
            "schedule: got alpha_bar that ends at 0",
        ),
        (
            {"schedule": diffusion.Schedule(np.array([0.6, 0.5]))},
            "schedule: got alpha_bar as ndarray, expected a tuple of numbers",
        ),
        ({"schedule": diffusion.Schedule(())}, r"schedule: got alpha_bar \(\), expected at least one number"),
        (
            {"schedule": diffusion.Schedule(((0.9, 0.8),))},
            r"schedule: got alpha_bar \(\(0.9, 0.8\),\), expected at least",
        ),
        ({"schedule": "cosine"}, r"schedule: got str, expected a Schedule, such as cosine_schedule\(\)"),
        ({"guidance": np.nan}, "guidance: got nan, expected a finite number"),
        ({"dropout": "a tenth"}, "dropout: got 'a tenth', expected a number"),
    ],
)
def test_what_is_refused(change, message):
    options = {"denoise": denoise, "schedule": SCHEDULE, "num_conditions": CLASSES} | change
    with pytest.raises(ValueError, match=message):
        tasks.diffusion(options.pop("denoise"), options.pop("schedule"), **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"inputs": lambda found: 255 * found},
            r"retain: inputs: got images from -.*, expected numbers in \[-1",
        ),
        ({"inputs": lambda found: found.at[0].set(jnp.nan)}, "retain: inputs: got images from nan to nan"),
        ({"labels": lambda found: found.at[0].set(CLASSES + 1)}, "retain: labels: got 4, expected ints from 0 to 3"),
        ({"labels": lambda found: found.at[0].set(-1)}, "retain: labels: got -1, expected ints from 0 to 3"),
    ],
)
def test_examples_that_the_model_cannot_handle_are_refused_before_any_step(change, message, params):
    retain = batch_of(16)
    ((name, changed),) = change.items()
    with pytest.raises(ValueError, match=message):
        unlearn("weighted sum", task(), params, batch_of(8), retain | {name: changed(retain[name])}, steps=1)


def test_integer_images_are_refused(params):
    # BUG: JAX raised its own error, since noise cannot be drawn in that dtype.
    batch = batch_of(8)
    batch["inputs"] = np.sign(batch["inputs"]).astype(np.int8)
    with pytest.raises(ValueError, match=r"^forget: inputs: got int8, expected floating point numbers"):
        unlearn("weighted sum", task(), params, batch, batch, steps=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: {"x": b["inputs"]}, "batch: got shapes"),
        (lambda b: b | {"labels": b["labels"][:, None]}, "batch: got shapes .*labels"),
    ],
)
def test_a_batch_with_other_names_or_shapes_is_refused(change, message, params):
    batch = change(batch_of(8))
    with pytest.raises(ValueError, match=f"^forget: {message}"):
        unlearn("weighted sum", task(), params, batch, batch, steps=1)


def test_a_model_that_predicts_more_channels_is_named(params):
    wide = lambda p, x_t, t, labels: jnp.concatenate([x_t, x_t], axis=-1)
    made = tasks.diffusion(wide, SCHEDULE, num_conditions=CLASSES)
    with pytest.raises(ValueError, match=r"denoise: returned shape \(8, 10\), expected that of x_t, \(8, 5\)"):
        made.outputs(params, batch_of(8), None)


def test_a_model_that_returns_more_than_its_prediction_is_named(params):
    # BUG: it failed for want of a shape, without a name.
    made = tasks.diffusion(lambda p, x_t, t, labels: (x_t, None), SCHEDULE, num_conditions=CLASSES)
    with pytest.raises(ValueError, match=r"^denoise: returned tuple, expected an array of the shape of x_t, \(8, 5\)"):
        made.outputs(params, batch_of(8), None)
    with pytest.raises(ValueError, match=r"^denoise: returned tuple, expected an array of the shape of x_t"):
        unlearn("weighted sum", made, params, batch_of(8), batch_of(8), steps=1)


def test_labels_of_a_narrow_dtype_do_not_overflow():
    # BUG: in uint8 the unconditional label, 1,000, became 232.
    shown = tasks.diffusion(
        lambda params, x_t, t, labels: 0 * x_t + params[labels][:, None], SCHEDULE, num_conditions=1_000, bounded=False
    )
    batch = {"inputs": jnp.zeros((2, 1)), "labels": jnp.array([3, 255], jnp.uint8)}
    outputs = shown.outputs(jnp.arange(1_001.0), batch, None)
    assert outputs["unconditional"].tolist() == [[1_000.0], [1_000.0]]
    assert outputs["other_condition"].tolist() == [[4.0], [256.0]]


def test_a_dropout_of_0_may_be_an_int(params):
    # BUG: JAX raised its own error.
    assert task(dropout=0).outputs(params, batch_of(4), jax.random.key(0))["counts"].tolist() == [1.0] * 4


def test_a_model_without_an_unconditional_label_is_refused_before_any_step(params):
    # BUG: the run ruined the parameters, or all of its steps were refused.
    table = lambda params, x_t, t, labels: (
        x_t * params["scale"] + jnp.take(params["shift"], labels, axis=0, mode="fill")
    )
    fewer, options = params | {"shift": params["shift"][:CLASSES]}, {"num_conditions": CLASSES}
    with pytest.raises(ValueError, match=r"^forget: num_conditions: got 3, but for label 3, which stands for no cond"):
        unlearn("weighted sum", tasks.diffusion(table, SCHEDULE, **options), fewer, batch_of(8), batch_of(16), steps=1)
    # Without dropout, the label is not needed.
    plain, settings = tasks.diffusion(table, SCHEDULE, dropout=0.0, **options), {"forget_objective": "other_condition"}
    settings |= {"learning_rate": 1e-3, "retain_weight": 1.0}
    sets = batch_of(8), batch_of(16)
    result = unlearn("weighted sum", plain, fewer, *sets, steps=1, settings=settings, probes=0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result.params))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda params: {"scale": params["scale"]}, r"^forget: original: got no leaf \['shift'\]"),
        (lambda params: params | {"shift": params["shift"][:2]}, r"^forget: original: leaf \['shift'\] has shape"),
        (lambda params: params | {"scale": jnp.nan}, r"^original: leaf \['scale'\] has numbers that are not"),
    ],
)
def test_an_original_of_another_model_is_refused_before_any_step(change, message, params):
    with pytest.raises(ValueError, match=message):
        unlearn("weighted sum", task(original=change(params)), params, batch_of(8), batch_of(16), steps=1)
