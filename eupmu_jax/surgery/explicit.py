"""Explicit unilateral gradient surgery (EUPMU, arXiv 2510.22124, Proposition 3.2), for one or many constraints."""

from typing import NamedTuple

import chex
import jax.numpy as jnp
import optax

from eupmu_jax import tolerances
from eupmu_jax._stack import algebra, checks, nnls, refusal

MAX_OBJECTIVES = nnls.MAX_CONSTRAINTS + 1


class UnilateralSurgeryState(NamedTuple):
    """State of `unilateral_surgery`; `tree_get` finds fields whose names are unique in the chain.

    Attributes:
      multipliers: `(K-1,)` multipliers of the last step.
      gram: `(K, K)` Gram matrix of the last step's gradients.
      feasible: `(K-1,)` bools: whether the last direction met each constraint. False where a loss above its limit
        cannot be brought down as fast as the tolerance demands: its gradient is zero, or conflicts with other
        constraints.
      tolerance_state: State of the tolerance.
      count: Number of steps taken.
      nonfinite_count: Number of steps refused because a gradient or loss was not finite.
    """

    multipliers: chex.Array
    gram: chex.Array
    feasible: chex.Array
    tolerance_state: chex.ArrayTree
    count: chex.Array
    nonfinite_count: chex.Array


def unilateral_surgery(
    tolerance: "chex.Numeric | optax.Schedule | tolerances.Tolerance" = 0.0,
    *,
    num_objectives: int | None = None,
    retain_weight: chex.Numeric = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Bends only the forget gradient, and no more than needed to keep every retain loss from rising too fast.

    .. math::
      d = \arg\min_d \tfrac12\|d - g_0\|^2 \quad\text{s.t.}\quad \langle g_k, d\rangle \ge -\epsilon_k,\; k = 1..K-1

    .. math::
      d = g_0 + \sum_k \lambda_k g_k,\qquad
      \lambda = \max\!\big(0, (-\langle g_1, g_0\rangle - \epsilon) / \|g_1\|^2\big) \text{ for } K = 2

    With a `retain_weight` w, the weighted sum :math:`g_0 + \sum_k w_k g_k` is bent instead of :math:`g_0`, and w is the
    least value of the multipliers: :math:`\lambda = \max(w, \dots)` for K = 2. The retain losses are then minimised
    too; with w = 0, as in the paper, they are only kept from rising too fast.

    The transform takes stacked gradients, every leaf `(K, *param.shape)` with the forget gradient in row 0, and returns
    a tree of the parameters' shapes. It comes first in a chain, and its output keeps the sign of a gradient.

    Guarantees, for the step `theta <- theta - alpha * d` (SGD): each retain loss rises by at most `alpha * tolerance`
    to first order, and the forget loss (with a `retain_weight`, the weighted sum) descends, since `<g_0, d> >= ||d||^2`
    for tolerances >= 0. A preconditioner that follows in the chain (Adam, Muon) bends d again, and only the span of the
    forget and retain gradients is protected.

    The guarantees hold for one batch and add up over steps: on a converged model, a tolerance of 0 lets the loss on the
    whole retain set rise far. To bound the whole run, use `tolerances.budget(limit, learning_rate=...)` as the
    tolerance with a `retain_weight` of 1 to 2, clip the norm after the surgery, and measure the final parameters
    (`furthest_feasible`).

    Inner products are summed in float32 (float64 for float64 gradients); the output has the parameters' dtypes. For
    K = 2 the result is the closed form; for K up to 16 it is the exact solution of the dual problem, found on device by
    a loop that reverse-mode differentiation cannot pass through.

    With a `retain_weight`, g_0 below stands for the weighted sum, and a multiplier of 0 for w:

    ==================================  ==============================================================
    rows                                result
    ==================================  ==============================================================
    nothing conflicts                   d = g_0, multipliers 0
    retain row zero                     its multiplier is 0
    retain rows parallel or duplicated  the same d as with one of them (the tightest)
    g_1 = -c g_0, c > 0, tolerance 0    d = 0: no direction forgets without harm
    a gradient or loss not finite       d = 0, state unchanged, `nonfinite_count` + 1
    ==================================  ==============================================================

    Later members of the chain still see the zero update of a refused step, and decay their moments or weights with it;
    wrap the chain in `eupmu_jax.skip_nonfinite` to leave them untouched too.

    Args:
      tolerance: Allowed increase of the retain losses in units of the loss per unit of step size: a float, a `(K-1,)`
        array, a schedule `count -> tolerance`, or a rule from `eupmu_jax.tolerances` (some read `losses`). After a
        transform that scales gradients by c, such as `optax.clip_by_global_norm`, it allows 1/c times as much.
      num_objectives: K. Needed if it is not 2, no tolerance array gives it, and the state must keep one shape from
        `init` on, as in `lax.scan`.
      retain_weight: w, a number >= 0 or a `(K-1,)` array.

    Returns:
      A transform with `update(updates, state, params=None, *, losses=None, levels=None, gram_fn=None, **extra_args)`.
      `losses` is `(K,)`; `levels` are `(K-1,)` retain losses measured elsewhere (on the whole retain set, say), which
      the tolerance reads instead; `gram_fn(updates) -> (K, K)` replaces `algebra.gram_matrix` (on a mesh,
      `sharding.gram_matrix`). Its state is a `UnilateralSurgeryState`.

    Raises:
      ValueError: For a negative or NaN tolerance or weight, one of the wrong length, K < 2, more than 15 constraints,
        or leaves without a common objective axis.

    >>> import optax
    >>> tx = optax.chain(unilateral_surgery(), optax.sgd(1.0))
    >>> params = {"w": jnp.zeros(2)}
    >>> grads = {"w": jnp.array([[-1.0, 1.0], [1.0, 0.0]])}  # forget, retain
    >>> updates, state = tx.update(grads, tx.init(params), params)
    >>> updates["w"].tolist(), optax.tree_utils.tree_get(state, "multipliers").tolist()
    ([-0.0, -1.0], [1.0])
    """
    rule = tolerances.as_tolerance(tolerance)
    fixed = count_fixed(num_objectives, rule, retain_weight)

    def init_fn(params):
        k, dtype = fixed or 2, algebra.accumulator_dtype(params)
        return UnilateralSurgeryState(
            jnp.zeros(k - 1, dtype),
            jnp.zeros((k, k), dtype),
            jnp.ones(k - 1, bool),
            rule.init(k - 1, dtype),
            *refusal.counters(),
        )

    def update_fn(updates, state, params=None, *, losses=None, levels=None, gram_fn=None, **extra_args):
        del extra_args
        k = checks.count_objectives(updates, params, fixed)
        checks.check_count(k, None, at_most=MAX_OBJECTIVES)
        gram = (gram_fn or algebra.gram_matrix)(updates)
        losses = checks.check_losses(losses, k)
        weights, finite, new = solve(rule, gram, state, losses, levels, retain_weight)
        return refusal.settle(finite, algebra.combine(updates, weights, params), new, fit(state, k))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def solve(
    rule: tolerances.Tolerance,
    gram: chex.Array,
    state: UnilateralSurgeryState,
    losses: chex.Array | None,
    levels: chex.Array | None,
    retain_weight: chex.Numeric = 0.0,
) -> tuple[chex.Array, chex.Array, UnilateralSurgeryState]:
    """Solves for the weights `(K,)` of the rows, given only their Gram matrix `(K, K)`.

    Returns:
      The weights, whether the step may be taken (everything is finite), and the new state, its counters unchanged.
    """
    k = gram.shape[0]
    levels = tolerances.check_levels(levels, losses, k - 1)
    epsilon, tolerance_state = tolerances.evaluate(rule, state.count, levels, state.tolerance_state, k - 1, gram.dtype)
    # A row with a non-finite element has a non-finite norm, so it is enough to check the Gram matrix.
    finite = jnp.all(jnp.isfinite(gram)) & jnp.all(epsilon > -jnp.inf)
    if losses is not None:
        finite &= jnp.all(jnp.isfinite(losses))
    safe = jnp.where(finite, gram, jnp.eye(k, dtype=gram.dtype))
    base = jnp.broadcast_to(jnp.asarray(retain_weight, gram.dtype), (k - 1,))
    # The weighted retain gradients' part in each constraint counts as additional tolerance.
    multipliers = base + nnls.solve_multipliers(safe, epsilon + jnp.sum(safe[1:, 1:] * base[None], axis=1))
    weights = jnp.concatenate([jnp.ones(1, gram.dtype), multipliers])
    # A finite slope may be too small for what the tolerance demands of it.
    finite &= jnp.all(jnp.isfinite(multipliers))

    feasible = nnls.is_met(gram, epsilon, multipliers)
    new = state._replace(multipliers=multipliers, gram=gram, feasible=feasible, tolerance_state=tolerance_state)
    return weights, finite, new


def count_fixed(num_objectives: int | None, rule: tolerances.Tolerance, retain_weight: chex.Numeric) -> int | None:
    """K if the arguments of a surgery determine it, else None; raises `ValueError` if they are invalid."""
    given = checks.check_numbers("retain_weight", retain_weight, 0, finite=True)
    fixed = checks.resolve_num_objectives(num_objectives, rule.num_constraints, given)
    if fixed is not None:
        checks.check_count(fixed, None, "num_objectives", at_most=MAX_OBJECTIVES)
    return fixed


def fit(state: UnilateralSurgeryState, num_objectives: int) -> UnilateralSurgeryState:
    """`state`, its arrays reset to zeros if they are for another number of objectives."""
    k, dtype = num_objectives, state.gram.dtype
    if state.gram.shape == (k, k):
        return state
    return state._replace(
        multipliers=jnp.zeros(k - 1, dtype), gram=jnp.zeros((k, k), dtype), feasible=jnp.zeros(k - 1, bool)
    )
