"""Random crops and flips, on the device."""

import chex
import jax
import jax.numpy as jnp


def augment(key: chex.PRNGKey, images: chex.Array, *, padding: int = 4) -> chex.Array:
    """Crops every image at random after zero padding, and flips it horizontally with probability 1/2.

    `out[i] = P(x[i])[dy : dy + H, dx : dx + W]`, where `P` pads with zeros on all four sides, and dy and dx are uniform
    on {0, ..., 2 padding}. Then left and right are exchanged with probability 1/2. All draws are independent for every
    image.

    This is a pure function that works under `jit` and `vmap`: call it for each batch with a new key. Zero is black for
    images in [0, 1]. Flipped digits and letters are different characters, so do not use it for digits or SVHN.

    Args:
      key: Key for this batch.
      images: `(B, H, W, C)`, any dtype.
      padding: Pixels on each side; 0 only flips.

    Returns:
      `(B, H, W, C)` of the same dtype.

    Raises:
      ValueError: If `images` does not have four axes, or `padding` is negative.

    Source: He et al., "Deep residual learning for image recognition", CVPR 2016, section 4.2. Cost: one padded copy
    of the batch and one gather.

    >>> images = jnp.arange(2 * 3 * 3 * 1, dtype=jnp.uint8).reshape(2, 3, 3, 1)
    >>> out = augment(jax.random.key(0), images, padding=1)
    >>> out.shape, out.dtype
    ((2, 3, 3, 1), dtype('uint8'))
    """
    if images.ndim != 4:
        raise ValueError(f"images: got shape {images.shape}, expected (B, H, W, C)")
    if padding < 0:
        raise ValueError(f"padding: got {padding}, expected 0 or more pixels")
    size, height, width, channels = images.shape
    crop_key, flip_key = jax.random.split(key)
    corners = jax.random.randint(crop_key, (size, 2), 0, 2 * padding + 1)
    mirrored = jax.random.bernoulli(flip_key, shape=(size,))
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))

    def one(image, corner, mirror):
        crop = jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), (height, width, channels))
        return jnp.where(mirror, crop[:, ::-1], crop)

    return jax.vmap(one)(padded, corners, mirrored)
