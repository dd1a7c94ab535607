"""How far to step: shorter steps while they carry the retain set over its limit, longer ones while they do not."""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from eupmu_jax._stack import checks

# Decay of the averages that are compared with a target: about ten steps.
DECAY = 0.9


class ScaleByLimitState(NamedTuple):
    """State of `scale_by_limit`.

    Attributes:
      scale: Factor applied to the last updates.
      peak: The largest scale so far.
      average: Average of the past retain figures, in which the last one counts half.
      averages: Averages of the forget and the retain figures over about 10 steps, before bias correction.
      count: Steps taken.
    """

    scale: chex.Array
    peak: chex.Array
    average: chex.Array
    averages: chex.Array
    count: chex.Array


def scale_by_limit(
    limit: chex.Numeric,
    margin: "chex.Numeric | Callable[[chex.Array], chex.Array]" = 0.0,
    *,
    start: chex.Numeric = 0.1,
    growth: chex.Numeric = 1.3,
    shrink: chex.Numeric = 0.5,
    least: chex.Numeric = 1e-3,
    target: chex.Numeric | None = None,
    safe: chex.Numeric = 0.0,
    most: chex.Numeric = 1.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales updates down when the retain figures rise above a limit, and gradually up again when they do not.

    .. math::
      s_t = \begin{cases}
        \max(\rho s_{t-1}, s_{min}) & e_t > p_t + margin(p_t) \\
        \min(\gamma s_{t-1}, s_{max}) & \text{else}
      \end{cases}, \qquad p_t = \max(limit, \bar e_{t-1}), \quad \bar e_t = (\bar e_{t-1} + e_t) / 2

    with :math:`e_t` the largest figure of the retain batches, :math:`\bar e_0 = 0`, :math:`s_0` = `start` and
    :math:`s_{max} = 1`. It goes after an optimizer, at the end of a chain.

    The first steps of Adam move every parameter by the whole learning rate, however small the gradient is, and a
    trained model whose gradients have vanished can lose in three such steps what it learned in thousands. No weight on
    a gradient prevents this, since Adam does not see its length. With short first steps, the error of the retain
    batches gives warning in time. The learning rate becomes an upper bound on the step, so one that is too large does
    no harm.

    A learning rate that is too small forgets nothing. With a `target`, steps may grow to up to `most` times the
    optimizer's while the forget figures are short of the target and the retain figures are at most `safe`. Between
    `safe` and the limit they keep their length, and at the target the bound is 1 again. Above the limit they may be as
    long as the longest step so far, since shorter ones may be too short to repair its damage. Both figures are averages
    in which the last ten or so steps count most, :math:`\ell_t` of the forget and :math:`r_t` of the retain batches.

    .. math::
      s_{max} = \begin{cases}
        \max(1, \max_{u < t} s_u) & r_t > limit \\
        most & \ell_t < target \text{ and } r_t \le safe \\
        \max(s_{t-1}, 1) & \ell_t < target \text{ and } r_t > safe \\
        1 & \text{else}
      \end{cases}

    Above the limit, a step is shortened only if the error rises by more than noise: steps that repair it should not be
    slowed down, and an error that stays put, as it does under very short steps, is no reason to shorten them. The
    figure of one batch is noisy; a rate of n examples with expectation :math:`\ell` has the standard deviation
    :math:`\sqrt{\ell (1 - \ell) / n}`, and a margin of twice that gives one false alarm in about 40 steps.

    Args:
      limit: Limit on the largest figure of the retain batches, such as an error rate: one number of at least 0. Unlike
        that of `retain_limit` it is neither a schedule nor one for each row.
      margin: Allowance for noise, by which one batch may exceed the limit or the average of the batches before: a
        number, or a function of the figure that is exceeded, which `optax.inject_hyperparams` takes for a schedule
        unless given `static_args="margin"`.
      start, growth, shrink, least: :math:`s_0, \gamma, \rho, s_{min}`: growth at least 1, the others positive,
        shrink below 1, start at most 1, least at most start.
      target: Target of the forget figure; None for steps that are never longer than the optimizer's.
      safe: Highest retain figure at which steps may grow beyond the optimizer's; at most the limit.
      most: The longest step, as a multiple of the optimizer's; at least 1.

    Returns:
      A transform whose `update` takes `errors`, `(K,)` figures of the batches, the first of which is read only if there
      is a target. Figures that are not finite leave the state unchanged.

    Raises:
      ValueError: For numbers outside these ranges, NaN or infinite ones, and in `update` without `errors`.

    Guarantee: every update is the optimizer's, times a number of at most 1, or `most` with a target. That the limit
    holds is not guaranteed.

    Source: the rule of trust regions and of Levenberg and Marquardt, Nocedal and Wright, "Numerical Optimization", 2nd
    edition, chapter 4, with a constraint in place of the agreement of model and function.

    >>> tx = scale_by_limit(0.02, 0.04, start=0.2)
    >>> state, scales = tx.init(jnp.zeros(1)), []
    >>> for error in (0.0, 0.3, 0.5, 0.1):
    ...     updates, state = tx.update(jnp.ones(1), state, errors=jnp.array([0.0, error]))
    ...     scales.append(round(float(updates[0]), 4))
    >>> scales  # longer, shorter, shorter, and longer as the error falls
    [0.26, 0.13, 0.065, 0.0845]

    >>> tx = scale_by_limit(0.02, 0.04, start=0.8, growth=2.0, target=0.5, safe=0.01, most=30.0)
    >>> state, scales = tx.init(jnp.zeros(1)), []
    >>> for errors in ([0.1, 0.0], [0.1, 0.0], [0.1, 0.05], [1.0, 0.0], [1.0, 0.0]):
    ...     updates, state = tx.update(jnp.ones(1), state, errors=jnp.array(errors))
    ...     scales.append(round(float(updates[0]), 4))
    >>> scales  # behind and safe twice, behind and no longer safe, and forgotten enough
    [1.6, 3.2, 3.2, 3.2, 1.0]
    """
    checks.check_number("limit", limit, 0, finite=True)
    if not callable(margin):
        checks.check_number("margin", margin, 0, finite=True)
    checks.check_number("growth", growth, 1, finite=True)
    checks.check_number("shrink", shrink, above=0, below=1)
    checks.check_number("least", least, above=0, most=1, finite=True)
    checks.check_number("start", start, above=0, most=1, finite=True)
    checks.check_number("target", 0.0 if target is None else target, 0, finite=True)
    checks.check_number("safe", safe, 0, finite=True)
    checks.check_number("most", most, 1, finite=True)
    if not checks.is_traced(least, start) and least > start:
        raise ValueError(f"least: got {least}, expected at most `start`, {start}")
    if not checks.is_traced(safe, limit) and safe > limit:
        raise ValueError(f"safe: got {safe}, expected at most `limit`, {limit}")

    def init_fn(params):
        del params
        # Separate arrays, for donation: filling a scalar with a scalar array gives that array.
        full = lambda value, *shape: jnp.array(jnp.full(shape, value, jnp.float32), copy=True)
        return ScaleByLimitState(full(start), full(start), full(0), full(0, 2), jnp.zeros((), jnp.int32))

    def longest(state, levels):
        if target is None:
            return 1.0
        short, is_safe = levels[0] < target, levels[1] <= safe
        bound = jnp.where(short, jnp.where(is_safe, most, jnp.maximum(state.scale, 1.0)), 1.0)
        # Steps no longer than the learning rate may be too short to repair what longer ones have done.
        return jnp.where(levels[1] > limit, jnp.maximum(state.peak, bound), bound)

    def update_fn(updates, state, params=None, *, errors=None, **extra_args):
        del params, extra_args
        errors = checks.check_errors(errors).astype(jnp.float32)
        figure, count = jnp.max(errors[1:]), optax.safe_increment(state.count)
        averages = DECAY * state.averages + (1 - DECAY) * jnp.stack([errors[0], figure])
        bound = longest(state, averages / (1 - jnp.float32(DECAY) ** count))
        past = jnp.maximum(limit, state.average)
        rises = figure > past + (margin(past) if callable(margin) else margin)
        scale = jnp.where(rises, jnp.maximum(shrink * state.scale, least), jnp.minimum(growth * state.scale, bound))
        scale = scale.astype(jnp.float32)
        new = ScaleByLimitState(scale, jnp.maximum(state.peak, scale), (state.average + figure) / 2, averages, count)
        finite = jnp.isfinite(figure) & (jnp.isfinite(errors[0]) | (target is None))
        # A figure that is not read may be non-finite, and must not stay in the averages.
        new = new._replace(averages=jnp.where(jnp.isfinite(averages), averages, state.averages))
        new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
        return jax.tree.map(lambda leaf: (leaf * new.scale).astype(leaf.dtype), updates), new

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
