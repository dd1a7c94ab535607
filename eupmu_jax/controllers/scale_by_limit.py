"""How far to step: shorter steps while they carry the retain set over its limit, longer ones while they do not."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from eupmu_jax._stack import checks


class ScaleByLimitState(NamedTuple):
    """State of `scale_by_limit`.

    Attributes:
      scale: By which the last updates were multiplied.
      average: Of the retain figures before, the last one counted half.
    """

    scale: chex.Array
    average: chex.Array


def scale_by_limit(
    limit: chex.Numeric,
    margin: chex.Numeric = 0.0,
    *,
    start: chex.Numeric = 0.1,
    growth: chex.Numeric = 1.3,
    shrink: chex.Numeric = 0.5,
    least: chex.Numeric = 1e-3,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales updates down where the retain figures rise above a limit, and step by step up again where they do not.

    .. math::
      s_t = \begin{cases}
        \max(\rho s_{t-1}, s_{min}) & e_t > limit + margin \text{ and } e_t \ge \bar e_{t-1} \\
        \min(\gamma s_{t-1}, 1) & \text{else}
      \end{cases}, \qquad \bar e_t = (\bar e_{t-1} + e_t) / 2

    with :math:`e_t` the largest figure of the retain batches, :math:`\bar e_0 = 0` and :math:`s_0` = `start`. It stands
    behind an optimizer: `optax.chain(surgery, optax.adam(1e-3), scale_by_limit(0.02, 0.04))`.

    The first steps of Adam move every parameter by the whole learning rate, however small the gradient is, and a
    trained model whose gradients have vanished can lose in three of them what it learned in thousands. No weight on a
    gradient prevents this, since Adam does not see its length. With short first steps the error of the retain batches
    gives warning in time. The learning rate becomes the largest step that is ever made, so that it needs little tuning.

    Above the limit a step is shortened only if the error does not fall: steps that repair it should not be slowed down.
    The figure of one batch is noisy; a rate of n examples with expectation :math:`\ell` has the standard deviation
    :math:`\sqrt{\ell (1 - \ell) / n}`, and a margin of twice that leaves one false alarm in about 40 steps.

    Args:
      limit: Of the figures, such as error rates, as in `retain_limit`.
      margin: By which one batch may exceed it, for its noise.
      start, growth, shrink, least: :math:`s_0, \gamma, \rho, s_{min}`: growth at least 1, the others positive,
        shrink below 1, start and least at most 1.

    Returns:
      A transform whose `update` takes `errors`, `(K,)` figures of the batches, of which the first is not looked at.
      Figures that are not finite leave its state as it is.

    Raises:
      ValueError: For numbers outside these ranges, NaN or infinite ones, and in `update` without `errors`.

    Guarantee: every update is the optimizer's, times a number of at most 1. That the limit holds is not guaranteed.

    Source: the rule of trust regions and of Levenberg and Marquardt, Nocedal and Wright, "Numerical Optimization", 2nd
    edition, chapter 4, with a constraint in place of the agreement of model and function.

    >>> tx = scale_by_limit(0.02, 0.04, start=0.2)
    >>> state, scales = tx.init(jnp.zeros(1)), []
    >>> for error in (0.0, 0.3, 0.5, 0.1):
    ...     updates, state = tx.update(jnp.ones(1), state, errors=jnp.array([0.0, error]))
    ...     scales.append(round(float(updates[0]), 4))
    >>> scales  # longer, shorter, shorter, and longer as the error falls
    [0.26, 0.13, 0.065, 0.0845]
    """
    for name, value in (("limit", limit), ("margin", margin)):
        checks.check_numbers(name, value, 0, finite=True)
    checks.check_numbers("growth", growth, 1, finite=True)
    checks.check_numbers("shrink", shrink, above=0, below=1)
    checks.check_numbers("least", least, above=0, most=1, finite=True)
    checks.check_numbers("start", start, above=0, most=1, finite=True)

    def init_fn(params):
        del params
        return ScaleByLimitState(jnp.asarray(start, jnp.float32), jnp.zeros((), jnp.float32))

    def update_fn(updates, state, params=None, *, errors=None, **extra_args):
        del params, extra_args
        figure = jnp.max(checks.check_errors(errors)[1:]).astype(jnp.float32)
        rises = (figure > limit + margin) & (figure >= state.average)
        scale = jnp.where(rises, jnp.maximum(shrink * state.scale, least), jnp.minimum(growth * state.scale, 1.0))
        new = ScaleByLimitState(scale.astype(jnp.float32), (state.average + figure) / 2)
        new = jax.tree.map(lambda a, b: jnp.where(jnp.isfinite(figure), a, b), new, state)
        return jax.tree.map(lambda leaf: (leaf * new.scale).astype(leaf.dtype), updates), new

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
