"""The schedule with which Stable Diffusion 1.x was trained."""

import numpy as np

from eupmu_jax._stack.checks import check_int
from eupmu_jax.objectives.diffusion import Schedule

FIRST, LAST = 0.00085, 0.012


def published_schedule(steps: int = 1_000) -> Schedule:
    r"""The schedule of variances whose square roots rise linearly, from 0.00085 to 0.012.

    .. math:: \bar\alpha_t = \prod_{s \le t} (1 - \beta_s), \quad
              \sqrt{\beta_s} = \sqrt{\beta_1} + \frac{s - 1}{T - 1} (\sqrt{\beta_T} - \sqrt{\beta_1})

    With it the published U-Net predicts epsilon for latent images scaled as in `latents`.

    Args:
      steps: T, at least 2; 1,000 for the published weights.

    Raises:
      ValueError: For fewer than two steps.

    >>> f"{published_schedule().alpha_bar[-1]:.6f}"
    '0.004660'
    """
    check_int("steps", steps, 2, static=True)
    return Schedule(tuple(np.cumprod(1 - np.linspace(FIRST**0.5, LAST**0.5, steps) ** 2).tolist()))
