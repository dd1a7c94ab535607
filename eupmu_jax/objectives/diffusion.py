r"""Objectives for diffusion models: schedules, what a model predicts, and target predictions that forget.

An image x becomes :math:`x_t = a_t x + s_t \epsilon` with :math:`a_t^2 = \bar\alpha_t = 1 - s_t^2`. A model predicts
:math:`\epsilon`, x, or :math:`v = a_t \epsilon - s_t x` (Salimans & Ho 2022, arXiv 2202.00512, appendix D).
"""

from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from eupmu_jax._stack.checks import check_int, check_number
from eupmu_jax.objectives._logits import promoted

Prediction = Literal["epsilon", "v", "x"]
PREDICTIONS = ("epsilon", "v", "x")


class Schedule(NamedTuple):
    """How much of an image is left at each time.

    Attributes:
      alpha_bar: Its values at T times, falling from almost 1 to almost 0; a tuple, so that equal schedules share
        compiled code.
    """

    alpha_bar: tuple[float, ...]

    @property
    def steps(self) -> int:
        """T."""
        return len(self.alpha_bar)

    def at(self, t: chex.Array, ndim: int) -> tuple[jax.Array, jax.Array]:
        """The pair (a, s) at times `t` of shape `(n,)`, shaped to multiply `(n, ...)` of `ndim` dimensions."""
        found = jnp.asarray(self.alpha_bar, jnp.float32)[t].reshape(-1, *[1] * (ndim - 1))
        return jnp.sqrt(found), jnp.sqrt(1 - found)


def linear_schedule(steps: int = 1_000, first: float = 1e-4, last: float = 0.02) -> Schedule:
    """Variances that rise linearly (Ho et al. 2020, arXiv 2006.11239, section 4).

    The defaults are for 1,000 steps. Fewer steps take proportionally larger variances, at most 0.999, so that only
    noise is left at their end too.

    >>> f"{linear_schedule().alpha_bar[-1]:.4g}", f"{linear_schedule(100).alpha_bar[-1]:.1g}"
    ('4.036e-05', '2e-05')
    """
    check_int("steps", steps, 2, static=True)
    variances = np.linspace(first, last, steps) * (1_000 / steps)
    return Schedule(tuple(np.cumprod(1 - np.minimum(variances, 0.999)).tolist()))


def cosine_schedule(steps: int = 1_000, offset: float = 0.008) -> Schedule:
    r"""The share that is left falls as a squared cosine (Nichol & Dhariwal 2021, arXiv 2102.09672, equation 17).

    .. math:: \bar\alpha_t = f(t) / f(0), \quad f(t) = \cos^2\left(\frac{t / T + s}{1 + s} \frac\pi2\right)

    for t = 1 to T, with no single variance above 0.999.

    >>> schedule = cosine_schedule(10)
    >>> round(schedule.alpha_bar[4], 4), schedule.steps
    (0.4938, 10)
    """
    check_int("steps", steps, 2, static=True)
    left = np.cos((np.arange(steps + 1) / steps + offset) / (1 + offset) * np.pi / 2) ** 2
    kept = np.maximum(left[1:] / left[:-1], 1e-3)
    return Schedule(tuple(np.cumprod(kept).tolist()))


def noised(schedule: Schedule, x: chex.Array, t: chex.Array, noise: chex.Array) -> jax.Array:
    """x_t of images `(n, ...)` at times `(n,)`.

    >>> x_t = noised(linear_schedule(), jnp.ones((1, 2)), jnp.array([999]), jnp.zeros((1, 2)))
    >>> np.round(np.asarray(x_t, float), 4).tolist()
    [[0.0064, 0.0064]]
    """
    a, s = schedule.at(t, x.ndim)
    return a * x + s * noise


def target(prediction: Prediction, schedule: Schedule, x: chex.Array, t: chex.Array, noise: chex.Array) -> chex.Array:
    """What a perfect model would predict for `noised(schedule, x, t, noise)`.

    >>> x, noise = jnp.ones((1, 2)), jnp.zeros((1, 2))
    >>> target("x", linear_schedule(), x, jnp.array([0]), noise).tolist()
    [[1.0, 1.0]]
    """
    _check_prediction(prediction)
    a, s = schedule.at(t, x.ndim)
    return {"epsilon": noise, "x": x, "v": a * noise - s * x}[prediction]


def epsilon_of(
    prediction: Prediction, schedule: Schedule, predicted: chex.Array, x_t: chex.Array, t: chex.Array
) -> chex.Array:
    """The noise that a prediction implies.

    >>> schedule, t, noise = cosine_schedule(10), jnp.array([3]), jnp.full((1, 2), 0.5)
    >>> x_t = noised(schedule, jnp.ones((1, 2)), t, noise)
    >>> v = target("v", schedule, jnp.ones((1, 2)), t, noise)
    >>> epsilon_of("v", schedule, v, x_t, t).round(4).tolist()
    [[0.5, 0.5]]
    """
    _check_prediction(prediction)
    a, s = schedule.at(t, x_t.ndim)
    return {"epsilon": predicted, "x": (x_t - a * predicted) / s, "v": a * predicted + s * x_t}[prediction]


def x_of(
    prediction: Prediction, schedule: Schedule, predicted: chex.Array, x_t: chex.Array, t: chex.Array
) -> chex.Array:
    """The image that a prediction implies.

    >>> schedule, t, noise = cosine_schedule(10), jnp.array([3]), jnp.full((1, 2), 0.5)
    >>> x_t = noised(schedule, jnp.ones((1, 2)), t, noise)
    >>> x_of("epsilon", schedule, noise, x_t, t).round(4).tolist()
    [[1.0, 1.0]]
    """
    _check_prediction(prediction)
    a, s = schedule.at(t, x_t.ndim)
    return {"epsilon": (x_t - s * predicted) / a, "x": predicted, "v": a * x_t - s * predicted}[prediction]


def check_fit(prediction: Prediction, schedule: Schedule) -> None:
    """Raises `ValueError` for a schedule under which a prediction does not determine the image.

    The share of the image that is left falls within [0, 1]. If nothing is left at the end, epsilon says nothing about
    the image, and if all is left at the beginning, x says nothing about the noise; v says both.

    >>> check_fit("epsilon", Schedule((0.5, 0.0)))
    Traceback (most recent call last):
    ValueError: schedule: got alpha_bar that ends at 0, where epsilon says nothing of the image; expected prediction 'v'
    """
    _check_prediction(prediction)
    if not isinstance(schedule, Schedule):
        raise ValueError(f"schedule: got {type(schedule).__name__}, expected a Schedule, such as cosine_schedule()")
    if not isinstance(schedule.alpha_bar, tuple):
        found = type(schedule.alpha_bar).__name__
        raise ValueError(f"schedule: got alpha_bar as {found}, expected a tuple of numbers, which is hashable")
    if not schedule.alpha_bar or not all(isinstance(share, float | int | np.number) for share in schedule.alpha_bar):
        raise ValueError(f"schedule: got alpha_bar {str(schedule.alpha_bar)[:60]}, expected at least one number")
    left = np.asarray(schedule.alpha_bar)
    if not (np.all(left >= 0) and np.all(left <= 1) and np.all(np.diff(left) < 0)):
        raise ValueError("schedule: got alpha_bar outside [0, 1] or not decreasing, expected decreasing shares")
    # In the precision of the computation, in which a share next to nothing is nothing; XLA flushes subnormal numbers.
    left = left.astype(np.float32)
    left = np.where(left < np.finfo(np.float32).tiny, 0, left)
    if prediction == "epsilon" and left[-1] == 0:
        raise ValueError(
            "schedule: got alpha_bar that ends at 0, where epsilon says nothing of the image; expected prediction 'v'"
        )
    if prediction == "x" and left[0] == 1:
        raise ValueError(
            "schedule: got alpha_bar that begins at 1, where x says nothing of the noise; expected prediction 'v'"
        )


def _check_prediction(prediction):
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction: got {prediction!r}, expected one of {', '.join(PREDICTIONS)}")


def min_snr_weights(prediction: Prediction, schedule: Schedule, t: chex.Array, gamma: float = 5.0) -> jax.Array:
    r"""Weights of squared errors that bring each time's loss of x to min(SNR, gamma) (Hang et al., arXiv 2303.09556).

    .. math:: w_x = \min(\mathrm{SNR}, \gamma), \quad w_\epsilon = w_x / \mathrm{SNR},
              \quad w_v = w_x / (\mathrm{SNR} + 1), \quad \mathrm{SNR} = a_t^2 / s_t^2

    so that the loss is the same, whatever is predicted. Where nothing is left of the image, :math:`w_\epsilon` is 1.
    Raises `ValueError` for a gamma that is not finite and above 0, or an unknown prediction.

    >>> np.round(np.asarray(min_snr_weights("epsilon", linear_schedule(), jnp.array([0, 999])), float), 4).tolist()
    [0.0005, 1.0]
    """
    _check_prediction(prediction)
    check_number("gamma", gamma, above=0, finite=True)
    a, s = schedule.at(t, 1)
    snr = a**2 / s**2
    if prediction == "epsilon":
        return jnp.minimum(1, gamma / snr)
    of_x = jnp.minimum(snr, gamma)
    return of_x / (snr + 1) if prediction == "v" else of_x


def stratified_times(key: chex.PRNGKey, count: int, steps: int) -> jax.Array:
    """Times `(count,)` in [0, steps), one in each of `count` equal parts, in random order: less noisy than free draws.

    The parts depend on `count`, so with one key batches of different sizes get different times, even in the rows that
    both have. For a step's forget and retain rows to share times, their batches must have the same size.

    >>> sorted(stratified_times(jax.random.key(0), 4, 8).tolist())[::2] < [2, 6]
    True
    """
    order, within = jax.random.split(key)
    places = (jnp.arange(count) + jax.random.uniform(within, (count,))) / count
    times = jnp.minimum((places * steps).astype(jnp.int32), steps - 1)
    return jax.random.permutation(order, times)


def squared_errors(predicted: chex.Array, wanted: chex.Array) -> jax.Array:
    """The mean squared error of each example, `(n,)`, in float32 at least; raises `ValueError` for unequal shapes.

    >>> squared_errors(jnp.ones((2, 3)), jnp.zeros((2, 3))).tolist()
    [1.0, 1.0]
    """
    if predicted.shape != wanted.shape:
        raise ValueError(f"predicted: got shape {predicted.shape}, expected that of wanted, {wanted.shape}")
    return jnp.mean(jnp.square(promoted(predicted) - promoted(wanted)), axis=tuple(range(1, predicted.ndim)))


def check_prediction(predicted: Any, x_t: chex.Array) -> None:
    """Raises `ValueError` unless a model returned an array of the shape of `x_t`, whose errors would be broadcast.

    >>> check_prediction((jnp.zeros(2),), jnp.zeros(2))
    Traceback (most recent call last):
    ValueError: denoise: returned tuple, expected an array of the shape of x_t, (2,)
    """
    if not hasattr(predicted, "shape"):
        raise ValueError(
            f"denoise: returned {type(predicted).__name__}, expected an array of the shape of x_t, {x_t.shape}"
        )
    if predicted.shape != x_t.shape:
        raise ValueError(f"denoise: returned shape {predicted.shape}, expected that of x_t, {x_t.shape}")


def negative_guidance(conditional: chex.Array, unconditional: chex.Array, guidance: float = 1.0) -> chex.Array:
    r"""ESD's target for a concept (Gandikota et al. 2023, arXiv 2303.07345, equation 6), from the original model.

    .. math:: y = f_0(x_t, \varnothing) - \eta\, (f_0(x_t, c) - f_0(x_t, \varnothing))

    With guidance 0 that is the unconditional prediction. The authors' newer code subtracts from the conditional one by
    default, and its scale is :math:`\eta + 1`: its default of 2 is a guidance of 1.

    >>> negative_guidance(jnp.array(3.0), jnp.array(1.0)).tolist()
    -1.0
    """
    return unconditional - guidance * (conditional - unconditional)


def guided(conditional: chex.Array, unconditional: chex.Array, guidance: float) -> chex.Array:
    r"""Classifier-free guidance, :math:`(1 + w) f(x_t, c) - w f(x_t, \varnothing)` (Ho & Salimans, arXiv 2207.12598).

    In the other convention, a scale of 1 + w. With 0 it is the conditional prediction.

    >>> guided(jnp.array(3.0), jnp.array(1.0), 2.0).tolist()
    7.0
    """
    return (1 + guidance) * conditional - guidance * unconditional
