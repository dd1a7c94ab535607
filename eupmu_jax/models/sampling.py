"""Samples of a diffusion model: DDIM and ancestral, with classifier-free guidance."""

import functools
import logging
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from eupmu_jax._stack.algebra import is_finite
from eupmu_jax._stack.checks import check_int, check_number
from eupmu_jax.objectives import diffusion
from eupmu_jax.tasks.examples import ROUNDED, check_images, check_labels
from eupmu_jax.tasks.task import check_function

logger = logging.getLogger("eupmu_jax")


def sample(
    denoise: Callable[[Any, Any, Any, Any], Any],
    params: chex.ArrayTree,
    schedule: diffusion.Schedule,
    labels: chex.Array,
    shape: tuple[int, ...],
    key: chex.PRNGKey,
    *,
    nothing: int,
    prediction: diffusion.Prediction = "v",
    steps: int = 50,
    guidance: float = 2.0,
    eta: float = 0.0,
    start: chex.Array | None = None,
    share: float = 1.0,
    clip: bool = True,
) -> chex.Array:
    r"""Samples images for conditions, starting from noise (Song et al. 2021, arXiv 2010.02502, equation 12).

    .. math:: x_u = a_u \hat x + \sqrt{s_u^2 - \sigma^2}\, \hat\epsilon + \sigma z, \quad
              \sigma = \eta\, \frac{s_u}{s_t} \sqrt{1 - a_t^2 / a_u^2}

    from each time t to the next, u, where the estimates of the image and the noise come from the guided prediction. All
    noise is drawn from the key, so a key determines the samples, on any devices.

    Args:
      denoise: `denoise(params, x_t, t, labels) -> prediction`, as for `tasks.diffusion`; `x_t` is never in bfloat16.
      params: Parameters of `denoise`; if training kept a moving average, use that.
      schedule: The schedule of training.
      labels: Ints `(n,)`.
      shape: Shape of an image.
      key: Key for all noise.
      nothing: The label that stands for no condition, after all others.
      prediction: What the model predicts.
      steps: Sampling steps, spread evenly over the schedule; each evaluates the model on a batch of 2n.
      guidance: w of `diffusion.guided`; 0 is the model's own conditional prediction.
      eta: 0 is DDIM, deterministic after the initial noise; 1 is ancestral sampling.
      start: Images `(n, *shape)` to start from instead of pure noise, noised up to `share` (Meng et al. 2022, SDEdit,
        arXiv 2108.01073); in [-1, 1] if `clip`.
      share: Fraction of the schedule, in (0, 1], to denoise from there. `steps` are spread over it, at most one for
        each of its times, 0 to `share` (T - 1), rounded.
      clip: Whether to clip the predicted image to [-1, 1] in every step; not for latent images.

    Returns:
      The images, `(n, *shape)`. A warning is logged if they are not finite.

    Raises:
      ValueError: If `denoise` is not a function; for no steps, or more than the share of the schedule has; an eta or
        share outside its range; a guidance that is not finite; predictions of another shape than the images; a share
        without `start`; no labels; start images of another shape, outside their range or not finite; a label that the
        model does not know; or a prediction that is unknown or does not fit the schedule.

    >>> zero = lambda params, x_t, t, labels: 0 * x_t
    >>> schedule = diffusion.cosine_schedule(20)
    >>> images = sample(zero, None, schedule, jnp.zeros(3, int), (2, 2, 1), jax.random.key(0), nothing=1, steps=5)
    >>> images.shape
    (3, 2, 2, 1)
    """
    check_function("denoise", denoise, "a function (params, x_t, t, labels) -> prediction", 4)
    if np.ndim(labels) != 1 or not len(labels):
        raise ValueError(f"labels: got shape {np.shape(labels)}, expected (n,) ints, at least one")
    diffusion.check_fit(prediction, schedule)
    check_int("nothing", nothing, 0, static=True)
    if not isinstance(shape, tuple | list):
        raise ValueError(f"shape: got {shape!r}, expected the shape of an image, such as (28, 28, 1)")
    if not isinstance(guidance, jax.core.Tracer):
        check_number("guidance", guidance, finite=True)
    if not isinstance(steps, int | np.integer):
        raise ValueError(f"steps: got {steps!r}, expected an int")
    if not 1 <= steps <= schedule.steps:
        raise ValueError(f"steps: got {steps}, expected 1 to {schedule.steps}, the steps of the schedule")
    check_number("eta", eta)
    if not isinstance(eta, jax.core.Tracer) and not 0 <= eta <= 1:
        raise ValueError(f"eta: got {eta}, expected a number from 0 (DDIM) to 1 (ancestral)")
    check_number("share", share)
    if not 0 < share <= 1:
        raise ValueError(f"share: got {share}, expected a share of the schedule in (0, 1]")
    if start is None and share != 1:
        raise ValueError(f"share: got {share} without start, expected the images to start from")
    if steps > (times := round(share * (schedule.steps - 1)) + 1):
        raise ValueError(f"steps: got {steps}, expected 1 to {times}, the times in a share of {share}")
    if start is not None:
        if np.shape(start) != (len(labels), *shape):
            raise ValueError(f"start: got shape {np.shape(start)}, expected {(len(labels), *shape)}")
        check_images("start", start, ROUNDED if clip else None, ", or for latents clip=False")
    # In uint8 the label for no condition could overflow.
    labels, shape = jnp.asarray(labels), tuple(shape)
    labels = labels.astype(jnp.promote_types(labels.dtype, jnp.int32))
    check_labels(labels, nothing + 1)
    fixed = denoise, schedule, shape, nothing, prediction, steps, float(share), clip
    images = _sample(*fixed, params, labels, key, guidance, eta, start)
    if not isinstance(images, jax.core.Tracer) and not is_finite(images):
        logger.warning(
            "params: the samples are not finite; the model may have diverged, or it has no condition %d, which "
            "`nothing` names",
            nothing,
        )
    return images


@functools.partial(jax.jit, static_argnums=range(8))
def _sample(
    denoise, schedule, shape, nothing, prediction, steps, share, clip, params, labels, key, guidance, eta, start
):
    n = len(labels)
    times = np.linspace(share * (schedule.steps - 1), 0, steps).round().astype(np.int32)
    left = np.asarray(schedule.alpha_bar, np.float32)
    now, after = left[times], np.append(left[times[1:]], np.float32(1))
    first, noises = jax.random.split(key)
    both = jnp.concatenate([labels, jnp.full_like(labels, nothing)])

    def step(x_t, given):
        t, now, after, key = given
        at = jnp.full(n, t)
        twice = jnp.concatenate([x_t, x_t])
        returned = denoise(params, twice, jnp.concatenate([at, at]), both)
        diffusion.check_prediction(returned, twice)
        conditional, unconditional = jnp.split(returned, 2)
        predicted = diffusion.guided(conditional, unconditional, guidance)
        x = diffusion.x_of(prediction, schedule, predicted, x_t, at)
        x = jnp.clip(x, -1, 1) if clip else x
        # At a time without noise, only the image is kept; 1 avoids a division by zero.
        gone = jnp.where(now < 1, 1 - now, 1)
        noise = (x_t - jnp.sqrt(now) * x) / jnp.sqrt(gone)
        # Where nothing is left of the image at the next time either, its noise may be drawn anew.
        left_over = now / jnp.where(after > 0, after, 1)
        sigma = eta * jnp.sqrt((1 - after) / gone) * jnp.sqrt(jnp.maximum(1 - left_over, 0))
        kept = jnp.sqrt(jnp.maximum(1 - after - sigma**2, 0))
        return jnp.sqrt(after) * x + kept * noise + sigma * jax.random.normal(key, x_t.shape), None

    x_t = jax.random.normal(first, (n, *shape))
    if start is not None:
        x_t = diffusion.noised(schedule, start, jnp.full(n, times[0]), x_t)
    return jax.lax.scan(step, x_t, (times, now, after, jax.random.split(noises, steps)))[0]
