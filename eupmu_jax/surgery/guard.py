"""A guard that keeps the update of any optax optimizer within a utility tolerance."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from eupmu_jax import tolerances
from eupmu_jax._stack import algebra, checks, nnls, refusal
from eupmu_jax._stack.states import check_same_state
from eupmu_jax.surgery.explicit import unilateral_surgery

MAX_ROUNDS = 4


class UtilityGuardState(NamedTuple):
    """State of `utility_guard`; the surgery's own fields (`multipliers`, `gram`) are found in it by name.

    Its counters share their names with those of the surgery inside it, so read them from the guard's state, which is
    found by its type: `optax.tree_utils.tree_get(state, "UtilityGuardState").nonfinite_count`.

    Attributes:
      surgery_state, inner_state, tolerance_state: States of the parts.
      guard_multipliers: `(K-1,)`; how much of each retain gradient was subtracted from the last update.
      guard_feasible: `(K-1,)` bools: whether the last update met each constraint to first order.
      step_scale: Share of the last update that backtracking kept: 1, 1/2, 1/4, ..., or 0 if none was small enough.
      count: Number of steps taken.
      nonfinite_count: Number of steps refused because a gradient, loss or update was not finite.
    """

    surgery_state: optax.OptState
    inner_state: optax.OptState
    tolerance_state: chex.ArrayTree
    guard_multipliers: chex.Array
    guard_feasible: chex.Array
    step_scale: chex.Array
    count: chex.Array
    nonfinite_count: chex.Array


def utility_guard(
    inner: optax.GradientTransformation,
    tolerance: "chex.Numeric | optax.Schedule | tolerances.Tolerance",
    surgery: optax.GradientTransformation | None = None,
    *,
    max_halvings: int = 0,
    num_objectives: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Moves the update that `inner` makes by the least amount that keeps every retain loss from rising too far.

    .. math::
      u = \text{inner}(\text{surgery}(g)), \qquad
      u' = \arg\min_{v} \tfrac12 \|v - u\|^2 \quad\text{s.t.}\quad \langle g_k, v\rangle \le \epsilon_k,\; k = 1..K-1

    Surgery alone protects its own output; a preconditioner, momentum or weight decay after it bends that direction
    again. The guard wraps the whole optimizer (Adam, Muon, schedule-free, momentum, AdamW) and corrects what is
    actually added to the parameters: :math:`u' = u - \sum_k \mu_k g_k` with the exact multipliers of
    `nnls.solve_multipliers`. Nothing may follow it in a chain.

    Guarantees: to first order each retain loss rises by at most its tolerance in this step, whatever `inner` is; the
    inequality holds for u' up to the rounding of its dtype, and u' = u where u already meets it. With `max_halvings`
    and a `value_fn`, u' is halved until the *measured* loss agrees: no loss that `value_fn` measures rises by more than
    max(tolerance, 0), and if that takes more halvings than allowed, the parameters stay unchanged. With
    `tolerances.budget(limit, rate)` and rate <= 1 this keeps the measured loss under its limit indefinitely.

    ===================================  ==============================================================
    case                                 result
    ===================================  ==============================================================
    u meets every constraint             u, guard multipliers 0
    u a positive multiple of its g_k     0 for tolerance 0
    retain gradient zero                 its constraint asks for nothing
    tolerance < 0 (above the limit)      a step that brings the loss down as demanded; where that cannot
                                         be met, `guard_feasible` is False
    gradient, loss or u not finite       0, no state changed, `nonfinite_count` + 1
    ===================================  ==============================================================

    Args:
      inner: Any optax optimizer, learning rate included: its updates are added to the parameters.
      tolerance: Allowed increase in this step, in units of the loss (not per unit of step size, which an optimizer need
        not have): a float, a `(K-1,)` array, a schedule, or a rule from `eupmu_jax.tolerances`.
      surgery: Collapses the stacked gradients for `inner`: any stacked transform; None is `unilateral_surgery(0.0)`,
        and `unilateral_surgery(jnp.inf)` passes the forget gradient on unchanged.
      max_halvings: 0 measures nothing. Otherwise `update` needs `params` and `value_fn(params) -> (K-1,)`. It is called
        once before the step, and the tolerance reads the result instead of `losses` if there are no `levels`; after the
        step it is called once or more.
      num_objectives: K; needed if it is not 2, no tolerance array gives it, and the state must keep one shape.

    Returns:
      A transform with `update(updates, state, params=None, *, losses=None, levels=None, value_fn=None,
      gram_fn=None, **extra_args)`, stacked tree in, parameter-shaped update out. `levels` and `gram_fn` are as in
      `unilateral_surgery`.

    Raises:
      ValueError: As `unilateral_surgery`; also for negative `max_halvings`, or missing `value_fn` or `params`.

    >>> guard = utility_guard(optax.adam(0.1), tolerance=0.0)
    >>> params, grads = jnp.zeros(2), jnp.array([[-1.0, 1.0], [1.0, 0.5]])  # forget, retain
    >>> update, state = guard.update(grads, guard.init(params), params)
    >>> bool(jnp.vdot(grads[1], update) <= 1e-7)
    True
    """
    rule = tolerances.as_tolerance(tolerance)
    fixed = checks.resolve_num_objectives(num_objectives, rule.num_constraints)
    if isinstance(max_halvings, jax.Array):
        raise ValueError(
            "max_halvings: got an array, expected an int; optax.inject_hyperparams turns ints into arrays unless "
            "given static_args='max_halvings'"
        )
    checks.check_int("max_halvings", max_halvings, 0)
    inner = checks.as_transform("inner", inner)
    surgery = unilateral_surgery(num_objectives=fixed) if surgery is None else surgery
    surgery = checks.as_transform("surgery", surgery)

    def init_fn(params):
        k, dtype = fixed or 2, algebra.accumulator_dtype(params)
        return UtilityGuardState(
            surgery.init(params),
            inner.init(params),
            rule.init(k - 1, dtype),
            jnp.zeros(k - 1, dtype),
            jnp.ones(k - 1, bool),
            jnp.ones([], dtype),
            *refusal.counters(),
        )

    def update_fn(updates, state, params=None, *, losses=None, levels=None, value_fn=None, gram_fn=None, **extra_args):
        k = checks.count_objectives(updates, params, fixed or 2)
        losses = checks.check_losses(losses, k)
        if max_halvings and (value_fn is None or params is None):
            raise ValueError(
                f"{'params' if params is None else 'value_fn'}: got None, but max_halvings measures the retain losses "
                "around the step: update(updates, state, params, value_fn=value_fn)"
            )

        def measure(params):
            values = checks.check_retain_losses(value_fn(params), k, None)
            # In half precision a loss plus its tolerance would be rounded, often upwards.
            return values.astype(jnp.promote_types(values.dtype, jnp.float32))

        measured = measure(params) if max_halvings else None
        levels = tolerances.check_levels(levels, losses, k - 1) if measured is None or levels is not None else measured

        extra_args |= {"losses": losses, "levels": levels, "gram_fn": gram_fn, "value_fn": value_fn}
        direction, surgery_state = surgery.update(updates, state.surgery_state, params, **extra_args)
        check_same_state("surgery", surgery_state, state.surgery_state, k)
        proposal, inner_state = inner.update(direction, state.inner_state, params, **extra_args)

        gram = (gram_fn or algebra.gram_matrix)(updates)
        dtype = jnp.promote_types(gram.dtype, state.guard_multipliers.dtype)
        gram = gram.astype(dtype)
        epsilon, tolerance_state = tolerances.evaluate(rule, state.count, levels, state.tolerance_state, k - 1, dtype)
        update, guard_multipliers, feasible = _project(proposal, updates, gram, epsilon)
        # The norm of the proposal and the corrected update may overflow where the proposal itself does not.
        given = [part for part in (losses, levels, measured) if part is not None]
        finite = algebra.all_finite((gram, algebra.squared_norm(proposal), update, given))
        finite &= jnp.all(epsilon > -jnp.inf)

        scale = jnp.ones([], dtype)
        if measured is not None:
            allowed = measured + jnp.maximum(epsilon, 0).astype(measured.dtype)

            def rises(scale):
                return jnp.any(~(measure(optax.apply_updates(params, _scaled(update, scale))) <= allowed))

            halvings = jax.lax.while_loop(
                lambda n: (n <= max_halvings) & rises(0.5**n), lambda n: n + 1, jnp.zeros([], jnp.int32)
            )
            scale = jnp.where(halvings > max_halvings, 0, 0.5**halvings).astype(dtype)
            update = _scaled(update, scale)
            feasible = _is_met(update, updates, gram, epsilon)

        new = state._replace(
            surgery_state=surgery_state,
            inner_state=inner_state,
            tolerance_state=tolerance_state,
            guard_multipliers=guard_multipliers,
            guard_feasible=feasible,
            step_scale=scale,
        )
        return refusal.settle(finite, update, new, state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _project(update, updates, gram, epsilon):
    """`update` moved onto the constraints, the multipliers that did it, and whether each is met."""
    norms = jnp.sqrt(jnp.diagonal(gram))[1:]
    measure = lambda update: _with_update(gram, updates, update)
    violated = lambda augmented, wanted, units: _violated(augmented, wanted, units, update)

    def is_open(state):
        _, augmented, wanted, _, rounds = state
        return (rounds < MAX_ROUNDS) & jnp.any(violated(augmented, wanted, 16) & (norms > 0))

    def project(state):
        update, augmented, wanted, total, rounds = state
        multipliers = nnls.solve_multipliers(augmented, wanted)
        # A constraint that cannot be met alongside the others is dropped, or it would undo them.
        wanted = jnp.where(nnls.is_met(augmented, wanted, multipliers), wanted, jnp.inf)
        update = jax.tree.map(lambda u, g: _correct(u, g, multipliers), update, updates)
        return update, measure(update), wanted, (total + multipliers).astype(total.dtype), rounds + 1

    # Another round removes the error that cancellation left in the one before. The zeros are made from the data, so
    # that they vary over devices inside `shard_map` as the rest does.
    none = jnp.zeros_like(norms, epsilon.dtype)
    start = (update, measure(update), epsilon + none, none, jnp.zeros([], jnp.int32))
    update, augmented, _, total, _ = jax.lax.while_loop(is_open, project, start)
    return update, total, ~violated(augmented, epsilon, 128)


def _is_met(update, updates, gram, epsilon):
    """Whether the update meets each constraint to first order, up to rounding."""
    return ~_violated(_with_update(gram, updates, update), epsilon, 128, update)


def _with_update(gram, updates, update):
    """The Gram matrix with minus the update in place of the forget gradient."""
    products = -algebra.inner_products(updates, update)[1:].astype(gram.dtype)
    size = algebra.squared_norm(update).astype(gram.dtype)
    return gram.at[0, 1:].set(products).at[1:, 0].set(products).at[0, 0].set(size)


def _violated(augmented, epsilon, units, update):
    """Which constraints are exceeded by more than `units` units of rounding and one of the update's own dtype."""
    rounding = units * jnp.finfo(augmented.dtype).eps
    coarse = max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(update))
    size, norms = jnp.sqrt(augmented[0, 0]), jnp.sqrt(jnp.diagonal(augmented))[1:]
    return -augmented[0, 1:] > epsilon + (rounding + coarse) * norms * size + rounding * jnp.abs(epsilon)


def _correct(update, rows, multipliers):
    corrected = update.astype(multipliers.dtype)
    for k, multiplier in enumerate(multipliers, start=1):
        corrected -= multiplier * rows[k]
    return corrected.astype(update.dtype)


def _scaled(update, scale):
    return jax.tree.map(lambda leaf: (scale * leaf).astype(leaf.dtype), update)
