"""Exact non-negative least squares in the dual of unilateral surgery, on device and inside jit."""

import chex
import jax
import jax.numpy as jnp

MAX_CONSTRAINTS = 15


def solve_multipliers(gram: chex.Array, tolerance: chex.Array) -> chex.Array:
    r"""Multipliers of the direction nearest to the forget gradient that respects every retain constraint.

    .. math::
      \min_d \tfrac12 \|d - g_0\|^2 \;\text{s.t.}\; \langle g_k, d\rangle \ge -\epsilon_k
      \quad\Longleftrightarrow\quad
      \min_{\lambda \ge 0} \tfrac12 \|g_0 + \sum_k \lambda_k g_k\|^2 + \sum_k \epsilon_k \lambda_k

    One constraint has the closed form :math:`\lambda = \max(0, (-\langle g_1, g_0\rangle - \epsilon) / \|g_1\|^2)`.
    More are solved by the dual active-set method of Goldfarb and Idnani (1983) written in Gram coordinates: finite,
    exact, and unaffected by dependent rows, since a row enters the active set only if it adds a direction.

    Args:
      gram: `(K, K)` inner products, the forget gradient in row 0.
      tolerance: `(K-1,)` allowed rates of increase; negative entries demand a decrease.

    Returns:
      `(K-1,)` non-negative multipliers. They are a solution; with dependent rows it is not the only one, but the
      direction is. Where :math:`\epsilon_k < 0` makes the constraints incompatible, those met first are kept.

    Edge cases: a zero row has multiplier 0; rows parallel within about `sqrt(64 eps)` count as dependent.

    >>> gram = jnp.array([[2.0, -1.0], [-1.0, 1.0]])
    >>> solve_multipliers(gram, jnp.array([0.0])).tolist(), solve_multipliers(gram, jnp.array([0.5])).tolist()
    ([1.0], [0.5])
    """
    if gram.shape[0] == 2:
        return _one_constraint(gram, tolerance)
    return _active_set(gram, tolerance)


def is_met(gram: chex.Array, tolerance: chex.Array, multipliers: chex.Array) -> chex.Array:
    r"""Whether :math:`d = g_0 + \sum_k \lambda_k g_k` meets each :math:`\langle g_k, d\rangle \ge -\epsilon_k`.

    `(K-1,)` bools; a violation within rounding counts as met.

    >>> gram = jnp.array([[1.0, 0.0], [0.0, 0.0]])  # no retain gradient, and yet its loss should fall
    >>> is_met(gram, jnp.array([-1.0]), jnp.zeros(1)).tolist()
    [False]
    """
    weights = jnp.concatenate([jnp.ones(1, gram.dtype), multipliers])
    sizes = jnp.sum(jnp.abs(gram[1:]) * weights[None], axis=1) + jnp.abs(tolerance)
    rounding = 128 * jnp.finfo(gram.dtype).eps * sizes
    return jnp.sum(gram[1:] * weights[None], axis=1) + tolerance >= -rounding


def _one_constraint(gram, tolerance):
    squared_norm = gram[1, 1]
    safe = jnp.where(squared_norm > 0, squared_norm, 1)
    multiplier = jnp.maximum(0, (-gram[0, 1] - tolerance) / safe)
    return jnp.where(squared_norm > 0, multiplier, 0)


def _active_set(gram, tolerance):
    m = gram.shape[0] - 1
    eps = jnp.finfo(gram.dtype).eps
    indices = jnp.arange(m)

    # Unit rows make every threshold below relative, whatever the scales of the gradients.
    norms = jnp.sqrt(jnp.diagonal(gram))
    row_norms, present = jnp.where(norms[1:] > 0, norms[1:], 1), norms[1:] > 0
    # Only demands (negative tolerances) lengthen d beyond g_0; a large allowance must not pass for rounding error.
    scale = jnp.maximum(norms[0], jnp.max(jnp.where(present, -tolerance, 0) / row_norms))
    scale = jnp.where(scale > 0, scale, 1)
    cosines = jnp.where(jnp.eye(m, dtype=bool), 1, gram[1:, 1:] / row_norms[:, None] / row_norms[None])
    offset = (gram[0, 1:] + tolerance) / row_norms / scale

    def slack(multipliers):
        return offset + jnp.sum(cosines * multipliers[None], axis=1)

    def solve_active(active, right):
        matrix = jnp.where(active[:, None] & active[None], cosines, jnp.eye(m, dtype=gram.dtype))
        with jax.default_matmul_precision("highest"):
            return jnp.linalg.solve(matrix, jnp.where(active, right, 0))

    def most_violated(multipliers, active, refused):
        candidates = jnp.where(present & ~active & ~refused, slack(multipliers), jnp.inf)
        entering = jnp.argmin(candidates)
        violated = candidates[entering] < -16 * eps * (1 + jnp.sum(multipliers))
        return jnp.where(violated, entering, -1)

    def body(state):
        multipliers, active, before, refused, entering, iteration = state
        reaction = solve_active(active, cosines[:, entering])
        independent = 1 - jnp.sum(jnp.where(active, cosines[entering] * reaction, 0))
        ratios = jnp.where(active & (reaction > eps), multipliers / jnp.where(reaction > eps, reaction, 1), jnp.inf)
        leaving = jnp.argmin(ratios)
        drop = ratios[leaving]
        full = jnp.where(independent > 64 * eps, jnp.maximum(-slack(multipliers)[entering], 0) / independent, jnp.inf)
        length = jnp.minimum(drop, full)
        direction = jnp.where(indices == entering, 1, -jnp.where(active, reaction, 0))
        moved = jnp.maximum(multipliers + length * direction, 0)
        # A matrix that is singular up to rounding may give anything.
        possible = jnp.isfinite(length) & jnp.all(jnp.isfinite(moved))

        enters = possible & (full <= drop)
        leaves = possible & ~enters
        moved = jnp.where(leaves & (indices == leaving), 0, moved)
        active = (active | (enters & (indices == entering))) & ~(leaves & (indices == leaving))
        # If a row is refused after all, the rows that left for it come back.
        moved, active = (jnp.where(possible, new, old) for new, old in zip((moved, active), before, strict=True))
        refused = refused | (~possible & (indices == entering))
        before = tuple(jnp.where(leaves, old, new) for new, old in zip((moved, active), before, strict=True))
        entering = jnp.where(leaves, entering, most_violated(moved, active, refused))
        return moved, active, before, refused, entering, iteration + 1

    # Made from the data, so that inside `shard_map` they vary over devices, as everything computed from it does.
    start, none = jnp.zeros_like(offset), jnp.zeros_like(offset, bool)
    state = (start, none, (start, none), none, most_violated(start, none, none), 0)
    found, active, *_ = jax.lax.while_loop(lambda s: (s[4] >= 0) & (s[5] < 20 * m), body, state)
    found = jnp.where(active, found, 0)
    # The active set is exact; solving once more on it removes the rounding of the steps that led there, unless rows are
    # so nearly dependent that it adds more.
    polished = jnp.maximum(jnp.where(active, solve_active(active, -offset), 0), 0)
    off = lambda multipliers: jnp.max(jnp.where(active, jnp.abs(slack(multipliers)), 0))
    better = off(polished) <= off(found) + 64 * eps * (1 + jnp.sum(found))
    better &= jnp.all(jnp.isfinite(polished))
    return jnp.where(better, polished, found) * scale / row_norms
