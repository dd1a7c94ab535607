import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from eupmu_jax.data import augment

pytestmark = pytest.mark.slow


def crops(image, padding):
    """Every image that `augment` may return, by (dy, dx, mirrored)."""
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    height, width, _ = image.shape
    return {
        (dy, dx, mirrored): padded[dy : dy + height, dx : dx + width][:, :: -1 if mirrored else 1]
        for dy in range(2 * padding + 1)
        for dx in range(2 * padding + 1)
        for mirrored in (False, True)
    }


def distinct(size, height, width, channels):
    """Images all of whose pixels differ from each other and from zero."""
    return (1 + np.arange(size * height * width * channels)).reshape(size, height, width, channels).astype(np.float32)


@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.sampled_from([(1, 3, 4, 3), (4, 6, 5, 1)]),
    padding=st.sampled_from([0, 4]),
)
def test_every_image_is_a_crop_of_its_padded_self_or_the_mirror_image_of_one(seed, shape, padding):
    images = distinct(*shape)
    out = jax.jit(augment, static_argnames="padding")(jax.random.key(seed), images, padding=padding)
    assert out.shape == images.shape
    for image, made in zip(images, np.asarray(out), strict=True):
        assert any(np.array_equal(made, crop) for crop in crops(image, padding).values())


def test_offsets_and_mirroring_are_uniform_and_independent():
    count, padding = 9000, 1
    image = distinct(1, 4, 4, 1)[0]
    out = np.asarray(augment(jax.random.key(0), jnp.broadcast_to(image, (count, *image.shape)), padding=padding))
    known = {crop.tobytes(): place for place, crop in crops(image, padding).items()}
    assert len(known) == 18
    places = [known[made.tobytes()] for made in out]
    found = [places.count(place) for place in known.values()]
    assert stats.chisquare(found).pvalue > 1e-3
    # Neighbours in the batch are drawn independently too, so they are equal as often as by chance.
    equal = sum(left == right for left, right in itertools.pairwise(places))
    assert stats.binomtest(equal, count - 1, 1 / 18).pvalue > 1e-3


def test_only_the_key_determines_the_result():
    images = jnp.asarray(distinct(16, 8, 8, 3))
    first, again, other = (np.asarray(augment(jax.random.key(seed), images)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    np.testing.assert_array_equal(jax.jit(augment)(jax.random.key(0), images), first)


def test_vmap_over_keys_is_one_call_for_each():
    images = jnp.asarray(distinct(6, 5, 5, 1).reshape(2, 3, 5, 5, 1))
    keys = jax.random.split(jax.random.key(3), 2)
    expected = jnp.stack([augment(key, batch) for key, batch in zip(keys, images, strict=True)])
    np.testing.assert_array_equal(jax.vmap(augment)(keys, images), expected)


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.bfloat16, jnp.float32])
def test_the_dtype_is_kept(dtype):
    images = jnp.asarray(distinct(3, 4, 4, 1), dtype)
    out = augment(jax.random.key(0), images)
    assert out.dtype == dtype
    np.testing.assert_array_equal(out, augment(jax.random.key(0), images.astype(jnp.int32)))


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"^images: got shape \(8, 8, 3\), expected \(B, H, W, C\)$"):
        augment(jax.random.key(0), jnp.zeros((8, 8, 3)))
    with pytest.raises(ValueError, match=r"^padding: got -1, expected 0 or more pixels$"):
        augment(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), padding=-1)
