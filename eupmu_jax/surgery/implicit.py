"""Implicit unilateral gradient surgery (EUPMU, arXiv 2510.22124, Equation 8): one backward pass for both losses."""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from eupmu_jax import tolerances
from eupmu_jax._stack import algebra, checks, refusal
from eupmu_jax._stack.states import check_unmasked, nodes
from eupmu_jax.gradients.value_and_grad import LOG_OFFSET, check_loss_scale, check_positive


class ImplicitSurgeryState(NamedTuple):
    """State of `implicit_surgery` and `reference_surgery`; `tree_get` finds fields whose names are unique in the chain.

    Attributes:
      multipliers: `(K-1,)`, for the next step's scalarised gradient.
      controller_state: State of the controller.
      tolerance_state: State of the tolerance.
      previous_losses: `(K-1,)` retain losses of the last step, on the surgery's scale; used by the `next_batch` proxy.
      count: Number of steps taken.
      nonfinite_count: Number of steps refused because a loss or update was not finite.
    """

    multipliers: chex.Array
    controller_state: optax.OptState
    tolerance_state: chex.ArrayTree
    previous_losses: chex.Array
    count: chex.Array
    nonfinite_count: chex.Array


def implicit_surgery(
    tolerance: "chex.Numeric | optax.Schedule | tolerances.Tolerance",
    controller: optax.GradientTransformation,
    loss_scale: str = "raw",
    proxy: str = "same_batch",
    learning_rate: "float | optax.Schedule | None" = None,
    initial_multiplier: chex.Numeric = 0.0,
    *,
    num_objectives: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Passes updates through and moves the multiplier by the change in retain loss that the updates cause.

    .. math::
      \delta_t = \frac{l_k(\theta_t) - l_k(\theta_{t+1})}{\alpha_t} + \epsilon_t, \qquad
      \lambda_{t+1} = \max(0, \lambda_t + \text{controller}(\delta_t))

    With `controller=optax.sgd(beta)` this is the paper's :math:`\lambda_t - \beta\delta_t`. The updates must come from
    `scalarized_value_and_grad` with `multipliers(state)`. In log scale, :math:`l` stands for :math:`\log(l + 10^{-8})`
    here and in that function.

    Proxies for the retain loss after the step:

    * `"same_batch"` evaluates it with `value_fn(new_params) -> (K-1,) retain losses`, which must reuse the step's
      batch, key and noise, so that the difference is due to the step alone, and must not touch BatchNorm statistics.
      The transform comes last in the chain, where the updates are what is added to the parameters.
    * `"next_batch"` takes it from the next step's `losses`: no second forward pass, but the noise between two batches
      is divided by the learning rate.
    * `"level"` ignores the change: :math:`\delta_t = \epsilon_t`. With `tolerances.budget(limit, 1.0)` that is the
      distance from the retain loss to its limit, so that a controller from `eupmu_jax.controllers` steers the level.

    Guarantees: multipliers are finite and >= 0. On frozen parameters the `same_batch` estimate is the tolerance, up to
    the rounding error of the loss divided by the learning rate, and exactly if one program measures both losses, as
    `mode="unroll"` does in float32. As the learning rate goes to 0, the multiplier's fixed point is the closed form of
    `unilateral_surgery`. The paper's controller does not bound the retain loss: on full batches with beta = eta * alpha
    it is proportional, and the loss settles lambda / eta above its target. A controller of the level with an integral
    part does bound it.

    A step whose losses or updates are not finite changes no field of the state but `nonfinite_count`, and its updates
    become 0. Wrap the chain in `eupmu_jax.skip_nonfinite` to restore the earlier members too. A learning rate of 0
    counts as no change in the loss.

    Args:
      tolerance: Allowed increase of the retain loss per unit of learning rate (per step if `learning_rate` is None),
        as in `unilateral_surgery`.
      controller: Any optax transform over the multipliers. It receives delta, a gradient to descend.
      loss_scale: `"raw"` or `"log"`, the same as in `scalarized_value_and_grad`.
      proxy: `"same_batch"`, `"next_batch"` or `"level"`.
      learning_rate: The step size to divide by, a float or the schedule itself. None divides by nothing.
      initial_multiplier: A float or `(K-1,)`, >= 0.
      num_objectives: K, if it is not 2 and neither the tolerance nor the initial multiplier has K-1 entries.

    Returns:
      A transform with `update(updates, state, params=None, *, losses, levels=None, value_fn=None, **extra_args)`; its
      state is an `ImplicitSurgeryState`. The tolerance reads the retain losses on the surgery's scale, or, without
      rescaling, `levels` `(K-1,)` if given: another measurement of the losses, or a metric that has no gradient
      (accuracy). In `extra_args`, `gradient_scale` is the scale of the gradient, and `on_measured` is called when
      `same_batch` measures; `implicit_step` uses them to check that the two scales agree and that nothing follows the
      surgery.

    Raises:
      ValueError: For an unknown scale or proxy, a controller that is no transform, a gradient of another scale, a
        tolerance or initial multiplier that is negative, not finite or of the wrong length, a learning rate that is not
        one number, missing `losses`, `same_batch` without `params` and `value_fn` or inside `optax.masked` or
        `optax.partition`, and, outside jit, a loss that is not positive in log scale (inside jit the step is refused
        and counted).

    >>> import optax
    >>> loss = lambda w: jnp.stack([(w - 1) ** 2, w**2])  # forget pulls to 1, retain to 0
    >>> tx = optax.chain(optax.sgd(0.1), implicit_surgery(0.0, optax.sgd(0.5), learning_rate=0.1))
    >>> w = jnp.array(0.5)
    >>> state = tx.init(w)
    >>> updates, state = tx.update(2 * (w - 1), state, w, losses=loss(w), value_fn=lambda w: loss(w)[1:])
    >>> multipliers(state).round(3).tolist()
    [0.55...]
    """
    check_loss_scale(loss_scale)
    if proxy not in ("same_batch", "next_batch", "level"):
        raise ValueError(f"proxy: got {proxy!r}, expected 'same_batch', 'next_batch' or 'level'")
    checks.check_numbers("initial_multiplier", initial_multiplier, 0, finite=True)
    if learning_rate is not None and not callable(learning_rate):
        checks.check_number("learning_rate", learning_rate, 0, finite=True, why=", or a schedule")
    rule = tolerances.as_tolerance(tolerance)
    if not callable(tolerance) and not isinstance(tolerance, tolerances.Tolerance):
        checks.check_numbers("tolerance", tolerance, finite=True, why=", with which the estimate is compared")
    return multiplier_transform(
        rule,
        checks.as_transform("controller", controller),
        loss_scale=loss_scale,
        proxy=proxy,
        learning_rate=learning_rate,
        initial_multiplier=initial_multiplier,
        num_objectives=num_objectives,
        project=lambda multipliers: jnp.maximum(multipliers, 0),
    )


def multipliers(state: optax.OptState) -> jax.Array:
    """The `(K-1,)` multipliers of the surgery in `state`, however it is chained or wrapped.

    Raises:
      ValueError: If the state holds no surgery, or more than one.

    >>> from eupmu_jax import unilateral_surgery
    >>> tx = optax.chain(unilateral_surgery(num_objectives=3), optax.adam(0.1))
    >>> multipliers(tx.init({"w": jnp.zeros(2)})).tolist()
    [0.0, 0.0]
    """
    # By their type, since parameters may have any names, which are then in the states of optimizers too.
    found = nodes(state, lambda node: hasattr(node, "multipliers") and hasattr(node, "nonfinite_count"))
    if len(found) != 1:
        raise ValueError(
            f"state: found {len(found)} fields named 'multipliers', expected the state of one surgery, in a chain that "
            "ends with implicit_surgery or begins with unilateral_surgery"
        )
    return found[0].multipliers


def multiplier_transform(
    rule: tolerances.Tolerance,
    controller: optax.GradientTransformation,
    *,
    loss_scale: str,
    proxy: str,
    learning_rate: "float | optax.Schedule | None",
    initial_multiplier: chex.Numeric,
    num_objectives: int | None,
    project: Callable[[chex.Array], chex.Array],
) -> optax.GradientTransformationExtraArgs:
    """The update that `implicit_surgery` and `reference_surgery` share; they differ in sign, scale and projection."""
    num_initial = checks.check_numbers("initial_multiplier", initial_multiplier)
    k = checks.resolve_num_objectives(num_objectives, rule.num_constraints, num_initial) or 2
    rescale = (lambda losses: losses) if loss_scale == "raw" else _log

    def step_size(count):
        return learning_rate(count) if callable(learning_rate) else learning_rate

    def init_fn(params):
        dtype = algebra.accumulator_dtype(params)
        start = jnp.array(jnp.broadcast_to(jnp.asarray(initial_multiplier, dtype), (k - 1,)), copy=True)
        return ImplicitSurgeryState(
            start,
            controller.init(start),
            rule.init(k - 1, dtype),
            jnp.zeros(k - 1, dtype),
            *refusal.counters(),
        )

    def update_fn(updates, state, params=None, *, losses=None, levels=None, value_fn=None, **extra_args):
        if (found := extra_args.get("gradient_scale", loss_scale)) != loss_scale:
            raise ValueError(
                f"loss_scale: got a gradient in scale {found!r}, expected {loss_scale!r} as in the surgery: "
                f"implicit_step(loss, optimizer, loss_scale={loss_scale!r})"
            )
        losses = checks.check_losses(losses, k, needed=True)
        if proxy == "same_batch" and (value_fn is None or params is None):
            raise ValueError(
                f"{'params' if params is None else 'value_fn'}: got None, but proxy='same_batch' evaluates the retain "
                "losses after the step: update(updates, state, params, losses=losses, value_fn=value_fn); "
                "proxy='next_batch' needs neither"
            )
        if proxy == "same_batch":
            check_unmasked(params)
        if loss_scale == "log":
            check_positive(losses, state.count)

        dtype = state.multipliers.dtype
        current = rescale(losses[1:].astype(dtype))
        if proxy == "same_batch":
            found = value_fn(optax.apply_updates(params, updates))
            before, after = current, rescale(checks.check_retain_losses(found, k, dtype))
            extra_args.get("on_measured", lambda: None)()
            measured_count, measured = state.count, True
        elif proxy == "level":
            before, after, measured_count, measured = current, current, state.count, True
        else:
            before, after = state.previous_losses, current
            # The first step has nothing to compare with; learning rate and tolerance are those of the step in between.
            measured_count, measured = jnp.maximum(state.count - 1, 0), state.count > 0
        alpha = step_size(measured_count)

        improvement = before - after
        if alpha is not None:
            improvement = jnp.where(alpha > 0, improvement / jnp.where(alpha > 0, alpha, 1), 0).astype(dtype)
        levels = current if levels is None else tolerances.check_levels(levels, losses, k - 1)
        epsilon, tolerance_state = tolerances.evaluate(
            rule, measured_count, levels, state.tolerance_state, k - 1, dtype
        )
        moves, controller_state = controller.update(improvement + epsilon, state.controller_state, state.multipliers)
        moved = project(state.multipliers + moves).astype(dtype)

        moments = [leaf for leaf in jax.tree.leaves(controller_state) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
        finite = algebra.all_finite((losses, current, improvement, epsilon, moved, moments, updates))
        old = (state.multipliers, state.controller_state)
        moved, controller_state = refusal.choose(jnp.asarray(measured), (moved, controller_state), old)
        new = state._replace(
            multipliers=moved,
            controller_state=controller_state,
            tolerance_state=tolerance_state,
            previous_losses=current,
        )
        return refusal.settle(finite, updates, new, state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _log(losses):
    return jnp.where(losses > 0, jnp.log(jnp.maximum(losses, 0) + LOG_OFFSET), jnp.nan)
