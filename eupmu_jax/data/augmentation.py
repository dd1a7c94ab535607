"""Random crops and mirror images, on the device."""

import chex
import jax
import jax.numpy as jnp


def augment(key: chex.PRNGKey, images: chex.Array, *, padding: int = 4) -> chex.Array:
    """Cuts every image at random out of its zero-padded self, and mirrors every second one on average.

    `out[i] = P(x[i])[dy : dy + H, dx : dx + W]`, with `P` zero padding on all four sides, dy and dx uniform on
    {0, ..., 2 padding}, and then left and right exchanged with probability 1/2, all independent for every image.

    A pure function: one call for each batch, with a new key; works under `jit` and `vmap`. Zero is black
    for images in [0, 1]. Mirrored digits and letters are other signs: not for digits or SVHN.

    Args:
      key: Of this batch.
      images: `(B, H, W, C)`, any dtype.
      padding: Pixels on each side; 0 mirrors alone.

    Returns:
      `(B, H, W, C)` of the same dtype.

    Raises:
      ValueError: If `images` has other than four axes, or `padding` is negative.

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
