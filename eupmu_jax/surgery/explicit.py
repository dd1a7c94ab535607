"""Explicit unilateral gradient surgery (EUPMU, arXiv 2510.22124, Proposition 3.2), for one or many constraints."""

from typing import NamedTuple

import chex
import jax.numpy as jnp
import optax

from eupmu_jax import tolerances
from eupmu_jax._stack import algebra, checks, nnls, refusal

MAX_OBJECTIVES = nnls.MAX_CONSTRAINTS + 1


class UnilateralSurgeryState(NamedTuple):
    """State of `unilateral_surgery`; `tree_get` reads what no other member of a chain has.

    Attributes:
      multipliers: `(K-1,)` multipliers of the last step.
      gram: `(K, K)` Gram matrix of the last step's gradients.
      feasible: `(K-1,)` bools: whether the last direction met each constraint. False where a loss above its limit
        cannot be brought down as fast as the tolerance demands: its gradient is zero, or others stand against it.
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
    r"""Bends the forget gradient, and only it, as little as keeps every retain loss from rising too fast.

    .. math::
      d = \arg\min_d \tfrac12\|d - g_0\|^2 \quad\text{s.t.}\quad \langle g_k, d\rangle \ge -\epsilon_k,\; k = 1..K-1

    .. math::
      d = g_0 + \sum_k \lambda_k g_k,\qquad
      \lambda = \max\!\big(0, (-\langle g_1, g_0\rangle - \epsilon) / \|g_1\|^2\big) \text{ for } K = 2

    With a `retain_weight` w, what is bent is the weighted sum :math:`g_0 + \sum_k w_k g_k` in place of :math:`g_0`, and
    w is the least value of the multipliers: :math:`\lambda = \max(w, \dots)` for K = 2. Then the retain losses are
    minimised too; with w = 0, as in the paper, they are only kept from rising too fast.

    The transform takes stacked gradients, every leaf `(K, *param.shape)` with the forget gradient in row 0, and returns
    a tree of the parameters' shapes. It stands first in a chain, and the updates keep the sign of a gradient.

    Guarantees, for the step `theta <- theta - alpha * d` (SGD): each retain loss rises by at most `alpha * tolerance`
    to first order, and the forget loss (with a `retain_weight`, the weighted sum) descends, since
    `<g_0, d> >= ||d||^2` for tolerances >= 0. A preconditioner that follows in the chain (Adam, Muon) bends d again,
    and only the forget and retain gradients' span is protected.

    They hold for the batch and add up over steps: on a converged model a tolerance of 0 lets the loss of the whole
    retain set rise far. For a bound on the run give `tolerances.budget(limit, learning_rate=...)` as the tolerance and
    a `retain_weight` of 1 to 2, clip the norm behind the surgery, and measure the end (`furthest_feasible`).

    Inner products are summed in float32 (float64 for float64 gradients); the output has the parameters' dtypes. For
    K = 2 the result is the closed form, for K up to 16 the exact solution of the dual problem, found on device by a
    loop, which reverse-mode differentiation does not go through.

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

    Members after this one in a chain still see the zero update of a refused step, and decay their moments or weights
    with it; wrap the chain in `eupmu_jax.skip_nonfinite` to leave them untouched too.

    Args:
      tolerance: Allowed increase of the retain losses in units of the loss per unit of step size: a float, a `(K-1,)`
        array, a schedule `count -> tolerance`, or a rule from `eupmu_jax.tolerances` (some read `losses`). Behind what
        scales gradients by c, such as `optax.clip_by_global_norm`, it allows 1/c times as much.
      num_objectives: K. Needed where the state must keep one shape from `init` on, as in `lax.scan`, and neither
        K = 2 nor a tolerance array tells it.
      retain_weight: w, a number >= 0 or a `(K-1,)` array.

    Returns:
      A transform with `update(updates, state, params=None, *, losses=None, levels=None, gram_fn=None, **extra_args)`.
      `losses` is `(K,)`; `levels` are `(K-1,)` retain losses measured otherwise (on the whole retain set, say) for the
      tolerance to read in their place; `gram_fn(updates) -> (K, K)` stands in for `algebra.gram_matrix` (on a mesh,
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
    """All of a surgery but the gradients: from their Gram matrix `(K, K)` the weights of the rows, `(K,)`.

    Returns:
      The weights, whether the step may be taken (all is finite), and the state then, its counters as they were.
    """
    k = gram.shape[0]
    levels = tolerances.check_levels(levels, losses, k - 1)
    epsilon, tolerance_state = tolerances.evaluate(rule, state.count, levels, state.tolerance_state, k - 1, gram.dtype)
    # A row with a non-finite element has a non-finite norm, so the Gram matrix tells all without another pass.
    finite = jnp.all(jnp.isfinite(gram)) & jnp.all(epsilon > -jnp.inf)
    if losses is not None:
        finite &= jnp.all(jnp.isfinite(losses))
    safe = jnp.where(finite, gram, jnp.eye(k, dtype=gram.dtype))
    base = jnp.broadcast_to(jnp.asarray(retain_weight, gram.dtype), (k - 1,))
    # What the weighted retain gradients do for each constraint is as good as that much more tolerance.
    multipliers = base + nnls.solve_multipliers(safe, epsilon + jnp.sum(safe[1:, 1:] * base[None], axis=1))
    weights = jnp.concatenate([jnp.ones(1, gram.dtype), multipliers])
    # A finite slope may be too small for what the tolerance demands of it.
    finite &= jnp.all(jnp.isfinite(multipliers))

    feasible = nnls.is_met(gram, epsilon, multipliers)
    new = state._replace(multipliers=multipliers, gram=gram, feasible=feasible, tolerance_state=tolerance_state)
    return weights, finite, new


def count_fixed(num_objectives: int | None, rule: tolerances.Tolerance, retain_weight: chex.Numeric) -> int | None:
    """K as far as the arguments of a surgery tell it, or None; raises `ValueError` where they cannot be."""
    given = checks.check_numbers("retain_weight", retain_weight, 0, finite=True)
    fixed = checks.resolve_num_objectives(num_objectives, rule.num_constraints, given)
    if fixed is not None:
        checks.check_count(fixed, None, "num_objectives", at_most=MAX_OBJECTIVES)
    return fixed


def fit(state: UnilateralSurgeryState, num_objectives: int) -> UnilateralSurgeryState:
    """`state`, with zeros where its arrays are those of another number of objectives."""
    k, dtype = num_objectives, state.gram.dtype
    if state.gram.shape == (k, k):
        return state
    return state._replace(
        multipliers=jnp.zeros(k - 1, dtype), gram=jnp.zeros((k, k), dtype), feasible=jnp.zeros(k - 1, bool)
    )
