"""Weights for the rows of a stack that follow measured figures: smoothing, PI feedback, saturation."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from eupmu_jax._stack import checks, refusal


class SteeringState(NamedTuple):
    """State of `forget_level` and `retain_limit`, with one entry for each steered row.

    Attributes:
      weights: Factors applied to the rows in the last step.
      levels: The smoothed figures.
      targets: What the levels were compared with.
      integrals: The integral part of the weights.
      averages: The figures' exponential averages before bias correction.
      count: Steps taken.
      nonfinite_count: Steps with figures, losses or a target that were not finite; they changed nothing else.
    """

    weights: chex.Array
    levels: chex.Array
    targets: chex.Array
    integrals: chex.Array
    averages: chex.Array
    count: chex.Array
    nonfinite_count: chex.Array


def steer(
    rows: slice,
    target: "chex.Numeric | optax.Schedule",
    *,
    sign: int,
    proportional: chex.Numeric,
    integral: chex.Numeric,
    decay: chex.Numeric,
    min_weight: chex.Numeric,
    max_weight: chex.Numeric,
    num_objectives: int | None,
) -> optax.GradientTransformationExtraArgs:
    """Multiplies these rows by weights that grow with `sign` times the distance from level to target.

    It does not look at the gradients: measured figures count even if a later transform refuses the step.
    """
    checks.check_number("proportional", proportional, 0, finite=True)
    checks.check_number("integral", integral, 0, finite=True)
    checks.check_number("decay", decay, 0, below=1)
    checks.check_number("max_weight", max_weight, above=0, finite=True)
    num_objectives = checks.resolve_num_objectives(num_objectives)
    room = max_weight - min_weight

    def init_fn(params):
        del params
        count = len(range(num_objectives or 2)[rows])
        # Separate arrays: a step cannot donate a state that holds one array twice.
        full = lambda value: jnp.full(count, value, jnp.float32)
        return SteeringState(full(min_weight), full(0), full(0), full(0), full(0), *refusal.counters())

    def update_fn(updates, state, params=None, *, losses=None, errors=None, **extra_args):
        del extra_args
        k = checks.count_objectives(updates, params, num_objectives)
        losses = checks.check_losses(losses, k)
        figures = checks.check_errors(errors, k).astype(jnp.float32)[rows]
        goal = jnp.float32(target(state.count) if callable(target) else target)
        if goal.shape not in ((), (1,), figures.shape):
            raise ValueError(
                f"{'target' if sign > 0 else 'limit'}: got shape {goal.shape}, expected a number or {figures.shape}"
            )
        finite = jnp.all(jnp.isfinite(figures)) & jnp.all(jnp.isfinite(goal))
        finite &= losses is None or jnp.all(jnp.isfinite(losses))
        averages = decay * state.averages + (1 - decay) * figures
        levels = averages / (1 - jnp.float32(decay) ** optax.safe_increment(state.count))
        distances = sign * (goal - levels)
        # Far from the target, where the weight is saturated anyway, the integral is held: otherwise it would be
        # saturated too by the time the level gets there, and at an error of 1, which no level exceeds, nothing would
        # bring it down again.
        is_full = (proportional * distances + state.integrals >= room) & (distances > 0)
        summed = jnp.clip(state.integrals + integral * distances, 0, room)
        integrals = jnp.where(is_full, state.integrals, summed)
        weights = min_weight + jnp.clip(proportional * distances + integrals, 0, room)
        goals = jnp.broadcast_to(goal, weights.shape)
        new = SteeringState(weights, levels, goals, integrals, averages, state.count, state.nonfinite_count)
        old = jax.tree.map(lambda leaf, like: jnp.broadcast_to(leaf, jnp.shape(like)), state, new)
        _, new = refusal.settle(finite, (), new, old)
        factors = jnp.ones(k, jnp.float32).at[rows].set(new.weights)

        def scale(leaf):
            # NaN, so that what follows refuses the step too.
            column = jnp.where(finite, factors, jnp.nan).reshape(-1, *[1] * (leaf.ndim - 1))
            return (leaf * column).astype(leaf.dtype)

        return jax.tree.map(scale, updates), new

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
