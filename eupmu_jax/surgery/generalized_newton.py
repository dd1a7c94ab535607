"""GeN (generalized Newton: Bu and Xu, ICLR 2025, arXiv 2407.02772): the step size at a parabola's minimum."""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from eupmu_jax._stack import algebra, checks, refusal
from eupmu_jax._stack.states import check_unmasked


class ScaleByGenState(NamedTuple):
    """State of `scale_by_gen`; `tree_get` finds fields whose names are unique in the chain.

    Attributes:
      learning_rate: Of the last step.
      count: Number of steps taken.
      nonfinite_count: Number of steps refused because an update was not finite.
    """

    learning_rate: chex.Array
    count: chex.Array
    nonfinite_count: chex.Array


def scale_by_gen(learning_rate: float, every: int = 1) -> optax.GradientTransformationExtraArgs:
    r"""Scales updates by a learning rate that follows the minimum of the loss along them.

    .. math::
      L(\theta + x u) \approx L(\theta) - b x + \tfrac12 a x^2, \qquad
      a = \frac{L_+ + L_- - 2 L_0}{\eta^2}, \quad b = \frac{L_- - L_+}{2 \eta}, \quad L_\pm = L(\theta \pm \eta u)

    .. math::
      \eta \leftarrow 0.9\, \eta + 0.1\, \operatorname{clip}(b / a,\, \eta / 2,\, 2 \eta) \;\text{ if } a > 0, b > 0

    Otherwise :math:`\eta` stays the same, or is halved if a measured loss is not finite. Like optax's line searches the
    transform comes last, and u are the updates as they are added to the parameters: `optax.chain(aggregators.ngdiff(),
    optax.sgd(1.0), scale_by_gen(0.01))`, or with `optax.adam(1.0)` before it, since the parabola is that along the
    preconditioned step. NGDiff measures the retain loss, which is what `explicit_step` passes as `value_fn`.

    Cost: three forward passes of `value_fn` every `every` steps, two if `value` is given, none in between. The loss
    must be deterministic: noise (dropout, another batch) in it is divided by :math:`\eta^2`. So is the rounding error
    of the loss, 1e-7 of it in float32, which may lengthen steps where the curvature is smaller than that. The authors'
    test of the fit, R^2 > 0.99, always holds for three points, and their factor 1 - t / T is `optax.scale_by_schedule`.

    ==================================  ===============================================================
    update                              result
    ==================================  ===============================================================
    zero, or against the descent        the learning rate stays
    along a concave or linear loss      the learning rate stays, but for rounding
    into a loss that is not finite      the learning rate is halved, and the step taken with it
    not finite                          zeros, state unchanged, `nonfinite_count` + 1
    ==================================  ===============================================================

    Args:
      learning_rate: At the start, positive.
      every: Steps from one measurement to the next; the first step measures.

    Returns:
      A transform with `update(updates, state, params, *, value_fn, value=None, **extra_args)`. `value_fn(params)` is
      the loss, a scalar, or an array, which is summed; `value` is `value_fn(params)`, if known.

    Raises:
      ValueError: For a learning rate that is not positive, `every` below 1, missing params or `value_fn`, or inside
        `optax.masked` or `optax.partition`.

    >>> tx = optax.chain(optax.sgd(1.0), scale_by_gen(learning_rate=0.5))
    >>> loss = lambda w: 2 * w**2
    >>> w = jnp.array(1.0)
    >>> updates, state = tx.update(jax.grad(loss)(w), tx.init(w), w, value_fn=loss)
    >>> round(float(state[1].learning_rate), 6)  # 0.9 * 0.5 + 0.1 * 0.25, where the minimum is
    0.475
    """
    checks.check_number("learning_rate", learning_rate, above=0, finite=True)
    checks.check_int("every", every, 1, " step")

    def init_fn(params):
        # A copy, since the state of optax.inject_hyperparams holds the array itself, and one step may donate both.
        start = jnp.array(learning_rate, algebra.accumulator_dtype(params), copy=True)
        return ScaleByGenState(start, *refusal.counters())

    def update_fn(updates, state, params=None, *, value_fn: Callable | None = None, value=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError("params: got None, expected the parameters at which value_fn is evaluated")
        if value_fn is None:
            raise ValueError("value_fn: got None, expected a function from parameters to the loss")
        check_unmasked(params)
        eta, dtype = state.learning_rate, state.learning_rate.dtype

        def loss_at(length):
            moved = jax.tree.map(lambda p, u: p + (length * u).astype(jnp.result_type(p)), params, updates)
            return jnp.sum(value_fn(moved)).astype(dtype)

        def measure(eta):
            here = jnp.sum(value_fn(params) if value is None else value).astype(dtype)
            ahead, behind = loss_at(eta), loss_at(-eta)
            # These are a eta^2 and b eta: their ratio is b / a over eta.
            curvature, slope = ahead + behind - 2 * here, (behind - ahead) / 2
            fits = (curvature > 0) & (slope > 0)
            best = eta * jnp.clip(slope / jnp.where(fits, curvature, 1), 0.5, 2)
            followed = jnp.where(fits, 0.9 * eta + 0.1 * best, eta)
            return jnp.where(jnp.isfinite(curvature + slope), followed, eta / 2)

        finite = algebra.all_finite(updates)
        eta = jax.lax.cond(finite & (state.count % every == 0), measure, lambda eta: eta, eta)
        scaled = jax.tree.map(lambda u: (eta * u).astype(u.dtype), updates)
        return refusal.settle(finite, scaled, state._replace(learning_rate=eta), state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
