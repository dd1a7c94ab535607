"""The diffusion transformer and the samplers: parameter counts, exact solutions, and reproducible samples."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from eupmu_jax.models.dit import DiT
from eupmu_jax.models.sampling import sample
from eupmu_jax.models.unet import UNet
from eupmu_jax.objectives import diffusion

pytestmark = pytest.mark.slow

SCHEDULE = diffusion.cosine_schedule(200)


@pytest.fixture(scope="module")
def model():
    return DiT(3, in_channels=2, image_size=8, patch_size=4, width=16, layers=2, heads=2, rngs=nnx.Rngs(0))


def test_the_parameter_count_follows_from_the_layers(model):
    w, numbers, patches = 16, 32, 4
    block = (w * 6 * w + 6 * w) + 4 * (w * w + w) + (w * 4 * w + 4 * w) + (4 * w * w + w)
    ends = (numbers * w + w) + patches * w + (w * w + w) + 4 * w + (w * 2 * w + 2 * w) + (w * numbers + numbers)
    counted = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert counted == 2 * block + ends


def test_the_first_prediction_is_zero_and_patches_return_to_their_places(model):
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 2))
    np.testing.assert_array_equal(model(x, jnp.array([0, 9]), jnp.array([0, 3])), 0)
    # Without blocks the last layer sees one patch at a time, so a change in a patch changes nothing elsewhere.
    alone = DiT(3, in_channels=2, image_size=8, patch_size=4, width=32, layers=0, heads=2, rngs=nnx.Rngs(0))
    alone.out.kernel[...] = jax.random.normal(jax.random.key(1), alone.out.kernel.shape)
    moved = x.at[:, 4:, :4].add(1.0)
    t, labels = jnp.array([0, 9]), jnp.array([0, 3])
    differs = np.any(np.asarray(alone(x, t, labels) != alone(moved, t, labels)), axis=(0, 3))
    expected = np.zeros((8, 8), bool)
    expected[4:, :4] = True
    np.testing.assert_array_equal(differs, expected)


def exact(params, x_t, t, labels):
    """The exact prediction of x for data with one point for each condition; without a condition, their mean."""
    points = jnp.concatenate([params, params.mean(axis=0, keepdims=True)])
    return jnp.broadcast_to(points[labels][:, None], x_t.shape)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("steps", [1, 7])
def test_an_exact_model_of_points_samples_these_points(steps, eta):
    points, labels = jnp.array([[-0.5], [0.25]]), jnp.array([0, 1, 1])
    options = {"nothing": 2, "prediction": "x", "steps": steps, "eta": eta}
    found = sample(exact, points, SCHEDULE, labels, (4, 1), jax.random.key(0), guidance=0.0, **options)
    np.testing.assert_allclose(found[:, :, 0], np.broadcast_to([[-0.5], [0.25], [0.25]], (3, 4)), atol=1e-5)
    # Guidance extrapolates from the mean through the point.
    pushed = sample(exact, points, SCHEDULE, labels, (4, 1), jax.random.key(0), guidance=1.0, **options)
    np.testing.assert_allclose(pushed[0, :, 0], 2 * -0.5 - -0.125, atol=1e-5)


def gaussian(params, x_t, t, labels):
    """The exact prediction of the noise for normal data with mean 0 and standard deviation `params`, linear in x_t."""
    a, s = SCHEDULE.at(t, x_t.ndim)
    return s * x_t / (a**2 * params**2 + s**2)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_exact_model_of_a_gaussian_samples_its_standard_deviation(eta):
    labels = jnp.zeros(4_000, int)
    options = {"nothing": 1, "prediction": "epsilon", "steps": 200, "guidance": 0.0, "eta": eta}
    found = sample(gaussian, 0.25, SCHEDULE, labels, (1,), jax.random.key(0), **options)
    np.testing.assert_allclose([found.mean(), found.std()], [0.0, 0.25], atol=0.015)


def test_samples_may_start_from_noised_images_and_need_not_be_clipped():
    # A model that predicts no noise takes its input for the image, so the start is returned with noise added.
    silent = lambda params, x_t, t, labels: 0 * x_t
    options = {"nothing": 1, "prediction": "epsilon", "steps": 20, "guidance": 0.0, "clip": False}
    labels, start = jnp.zeros(500, int), jnp.full((500, 1), 3.0)
    draw = lambda **more: sample(silent, None, SCHEDULE, labels, (1,), jax.random.key(0), **options | more)
    found = draw(start=start, share=0.1)
    a, s = (float(part[0]) for part in SCHEDULE.at(jnp.array([round(0.1 * (SCHEDULE.steps - 1))]), 1))
    np.testing.assert_allclose(found.mean(), 3.0, atol=0.1)
    np.testing.assert_allclose(found.std(), s / a, rtol=0.1)
    assert np.abs(draw(start=start / 3, share=0.1, clip=True)).max() <= 1
    assert np.abs(draw()).max() > 1


def test_equal_keys_give_equal_samples_and_different_keys_different_ones(model):
    graph, params = nnx.split(model, nnx.Param)
    denoise = lambda params, x_t, t, labels: x_t + nnx.merge(graph, params)(x_t, t, labels)
    draw = lambda key: sample(denoise, params, SCHEDULE, jnp.arange(3), (8, 8, 2), key, nothing=3, steps=3)
    one = draw(jax.random.key(0))
    np.testing.assert_array_equal(one, draw(jax.random.key(0)))
    assert np.any(one != draw(jax.random.key(1)))
    assert np.abs(one).max() <= 1


ON_EIGHT = """
import jax, numpy as np
import jax.numpy as jnp
from flax import nnx
from eupmu_jax.models.dit import DiT
from eupmu_jax.models.sampling import sample
from eupmu_jax.objectives import diffusion
from eupmu_jax.sharding import batch_shardings, make_mesh

model = DiT(3, in_channels=2, image_size=8, patch_size=4, width=16, layers=2, heads=2, rngs=nnx.Rngs(0))
graph, params = nnx.split(model, nnx.Param)
denoise = lambda params, x_t, t, labels: x_t + nnx.merge(graph, params)(x_t, t, labels)
labels, schedule = jnp.arange(16) % 3, diffusion.cosine_schedule(200)
mesh = make_mesh(8)
placed = jax.device_put(labels, batch_shardings(labels, mesh))
draw = lambda labels, seed: sample(denoise, params, schedule, labels, (8, 8, 2), jax.random.key(seed), nothing=3)
one, eight, other = draw(labels, 0), draw(placed, 0), draw(placed, 1)
assert len(placed.sharding.device_set) == 8
np.testing.assert_allclose(one, eight, atol=1e-4)
assert np.abs(np.asarray(eight - other)).mean() > 0.1
"""


def test_one_key_gives_the_same_samples_on_eight_devices(on_devices):
    ended = subprocess.run([sys.executable, "-c", ON_EIGHT], env=on_devices(8), capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 201}, "steps: got 201, expected 1 to 200, the steps of the schedule"),
        ({"steps": 0}, "steps: got 0"),
        ({"eta": 2.0}, "eta: got 2.0, expected a number from 0"),
        ({"nothing": 1, "labels": jnp.array([2])}, "labels: got 2, expected ints from 0 to 1"),
        ({"share": 0.0}, "share: got 0.0, expected a share of the schedule"),
        ({"start": jnp.zeros((2, 1))}, r"start: got shape \(2, 1\), expected \(1, 1\)"),
        ({"share": 0.5}, "share: got 0.5 without start, expected the images to start from"),
        ({"shape": 3}, "shape: got 3, expected the shape of an image"),
        ({"labels": 1}, r"labels: got shape \(\), expected \(n,\) ints, at least one"),
        ({"labels": jnp.zeros(0, int)}, r"labels: got shape \(0,\), expected \(n,\) ints, at least one"),
        ({"steps": 5.0}, "steps: got 5.0, expected an int"),
        (
            {"share": 0.1, "steps": 22, "start": jnp.zeros((1, 1))},
            "steps: got 22, expected 1 to 21, the times in a share of 0.1",
        ),
        ({"start": jnp.full((1, 1), 255.0)}, r"start: got images from 255 to 255, .* or for latents clip=False"),
        ({"start": np.full((1, 1), np.nan)}, "start: got images from nan to nan"),
        ({"start": jnp.full((1, 1), jnp.inf), "clip": False}, "start: got numbers from inf to inf, expected finite"),
        ({"prediction": "score"}, "prediction: got 'score', expected one of epsilon, v, x"),
        ({"guidance": np.nan}, "guidance: got nan, expected a finite number"),
        ({"nothing": None}, "nothing: got None, expected an int of at least 0"),
        ({"eta": None}, "eta: got None, expected a number"),
        ({"share": "half"}, "share: got 'half', expected a number"),
        ({"denoise": {}}, "denoise: got {}, expected a function"),
        ({"denoise": lambda x_t, t, labels: x_t}, r"denoise: got a function of \(x_t, t, labels\), expected a func"),
    ],
)
def test_what_is_refused(change, message):
    options = {"labels": jnp.zeros(1, int), "shape": (1,), "key": jax.random.key(0), "nothing": 1} | change
    with pytest.raises(ValueError, match=message):
        sample(options.pop("denoise", exact), None, SCHEDULE, **options)


def test_guidance_and_eta_may_be_traced():
    # BUG: a traced eta was compared with 0 and 1.
    options = {"labels": jnp.zeros(2, int), "shape": (1,), "key": jax.random.key(0), "nothing": 1, "steps": 3}
    half = lambda params, x_t, t, labels: x_t / 2
    draw = lambda guidance, eta: sample(half, None, SCHEDULE, **options, guidance=guidance, eta=eta)
    np.testing.assert_allclose(jax.jit(draw)(1.5, 0.5), draw(1.5, 0.5), rtol=1e-4, atol=1e-4)


def test_a_share_may_be_an_array():
    # BUG: JAX refused it as a static argument, as it is not hashable.
    zero = lambda params, x_t, t, labels: 0 * x_t
    options = {"nothing": 1, "steps": 2, "start": jnp.zeros((1, 1)), "share": jnp.float32(0.5)}
    found = sample(zero, None, SCHEDULE, jnp.zeros(1, int), (1,), jax.random.key(0), **options)
    assert np.isfinite(found).all()


def test_samples_that_are_not_finite_are_warned_about(caplog):
    # BUG: an unconditional label that the model lacks silently gave NaN.
    table = lambda params, x_t, t, labels: x_t * jnp.take(params, labels, mode="fill")[:, None]
    sample(table, jnp.ones(3), SCHEDULE, jnp.zeros(1, int), (1,), jax.random.key(0), nothing=2, steps=2)
    assert not caplog.text
    sample(table, jnp.ones(3), SCHEDULE, jnp.zeros(1, int), (1,), jax.random.key(0), nothing=7, steps=2)
    assert "it has no condition 7, which `nothing` names" in caplog.text


@pytest.mark.parametrize("share", [0.3, 0.95, 1.0])
def test_with_as_many_steps_as_times_each_time_is_visited_once(share):
    seen, schedule = [], diffusion.cosine_schedule(11)

    def denoise(params, x_t, t, labels):
        jax.debug.callback(lambda t: seen.append(int(t)), t[0], ordered=True)
        return 0 * x_t

    steps = round(share * 10) + 1
    options = {"nothing": 1, "share": share, "steps": steps, "start": jnp.zeros((1, 1))}
    sample(denoise, None, schedule, jnp.zeros(1, int), (1,), jax.random.key(0), **options).block_until_ready()
    jax.effects_barrier()
    assert seen == list(range(steps))[::-1]


def test_traced_starts_are_not_checked():
    zero = lambda params, x_t, t, labels: 0 * x_t
    draw = lambda start: sample(
        zero, None, SCHEDULE, jnp.zeros(1, int), (1,), jax.random.key(0), nothing=1, steps=2, start=start
    )
    assert np.isfinite(jax.jit(draw)(jnp.full((1, 1), 3.0))).all()


@pytest.mark.parametrize("kind", [DiT, UNet])
def test_a_model_without_heads_channels_or_conditions_is_refused(kind):
    # BUG: a division by zero; without conditions, an error of the first prediction.
    for name in ("heads", "in_channels", "num_conditions"):
        with pytest.raises(ValueError, match=f"^{name}: got 0, expected an int of at least 1"):
            kind(**{"num_conditions": 3, name: 0}, rngs=nnx.Rngs(0))


def test_a_model_without_width_or_pixels_is_refused():
    # BUG: a division by zero for one, a model of nothing for the other.
    with pytest.raises(ValueError, match=r"^widths: got \(8, 0\), expected even multiples"):
        UNet(3, widths=(8, 0), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"^image_size: got 0, expected an int of at least 1"):
        DiT(3, image_size=0, rngs=nnx.Rngs(0))


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="patch_size: got 3, expected a divisor of the image size 8"):
        DiT(3, patch_size=3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="width: got 10, expected an even multiple of heads, 4"):
        DiT(3, width=10, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("size", [(16, 16), (4, 16)])
def test_an_image_of_another_size_is_named(model, size):
    with pytest.raises(ValueError, match=rf"x: got shape \(2, {size[0]}, 16, 2\), expected \(n, 8, 8, 2\)"):
        model(jnp.ones((2, *size, 2)), jnp.array([0, 5]), jnp.array([0, 1]))


@pytest.mark.parametrize("label", [-1, 4])
def test_a_label_without_a_row_is_refused_instead_of_giving_nan(model, label):
    unet = UNet(3, in_channels=2, widths=(8, 16), blocks=1, groups=4, rngs=nnx.Rngs(0))
    for one in (model, unet):
        with pytest.raises(ValueError, match=f"labels: got {label}, expected ints from 0 to 3"):
            one(jnp.ones((2, 8, 8, 2)), jnp.array([0, 5]), jnp.array([0, label]))


@pytest.mark.parametrize("prediction", ["v", "epsilon"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_samples_are_finite_under_a_schedule_that_starts_without_noise(prediction, eta):
    schedule = diffusion.Schedule((1.0, 0.5, 0.1))
    zero = lambda params, x_t, t, labels: 0 * x_t
    drawn = sample(
        zero,
        None,
        schedule,
        jnp.zeros(2, int),
        (3,),
        jax.random.key(0),
        nothing=1,
        steps=3,
        prediction=prediction,
        eta=eta,
    )
    assert np.isfinite(drawn).all()


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_samples_are_finite_under_a_schedule_that_leaves_nothing_at_several_times(eta):
    # BUG: the share that is left was 0 / 0 from one such time to the next, also where only float32 rounds it to 0.
    schedule = diffusion.linear_schedule(50, last=0.5)
    assert np.float32(schedule.alpha_bar[-2]) == 0
    options = {"nothing": 2, "prediction": "x", "steps": 50, "eta": eta, "guidance": 0.0}
    points = jnp.array([[-0.5], [0.25]])
    drawn = sample(exact, points, schedule, jnp.array([0, 1]), (3, 1), jax.random.key(0), **options)
    np.testing.assert_allclose(drawn[:, :, 0], np.broadcast_to([[-0.5], [0.25]], (2, 3)), atol=1e-5)


def test_a_bfloat16_model_computes_in_bfloat16():
    # BUG: float32 time features turned all activations into float32.
    dit = DiT(3, in_channels=2, image_size=8, patch_size=4, width=16, layers=1, heads=2, rngs=nnx.Rngs(0))
    for model in (dit, UNet(3, in_channels=2, widths=(8, 16), blocks=1, groups=4, rngs=nnx.Rngs(0))):
        nnx.update(model, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), nnx.state(model, nnx.Param)))
        shape = jax.eval_shape(model, jnp.ones((2, 8, 8, 2), jnp.bfloat16), jnp.array([0, 5]), jnp.array([0, 1]))
        assert shape.dtype == jnp.bfloat16


def test_predictions_of_another_shape_are_refused():
    # BUG: a single number for each image was broadcast to all of its pixels.
    draw = lambda narrow: sample(narrow, None, SCHEDULE, jnp.zeros(1, int), (2,), jax.random.key(0), nothing=1)
    with pytest.raises(ValueError, match=r"denoise: returned shape \(2, 1\), expected that of x_t, \(2, 2\)"):
        draw(lambda params, x_t, t, labels: x_t[:, :1])
    with pytest.raises(ValueError, match=r"^denoise: returned dict, expected an array of the shape of x_t, \(2, 2\)"):
        draw(lambda params, x_t, t, labels: {"sample": x_t})
