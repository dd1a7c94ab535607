"""OMD-TCH (Liu et al. 2024, arXiv 2410.21764): Chebyshev scalarisation, its maximum found by online mirror descent."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from eupmu_jax._stack.checks import check_number, check_numbers
from eupmu_jax.aggregators._weighting import count_of, from_losses
from eupmu_jax.aggregators.chebyshev import excess

_VARIANTS = ("eg", "pgd")


class OmdTchMemory(NamedTuple):
    """What `omd_tch` keeps: the weights `(K,)` on the simplex for the next step, for `"eg"` their logarithms."""

    dual: chex.Array


def omd_tch(
    eta: float = 0.1,
    variant: str = "eg",
    weights: "chex.Numeric" = 1.0,
    ideal: "chex.Numeric" = 0.0,
    *,
    num_objectives: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Shifts weight, step by step, to the objectives that are furthest from their ideals.

    .. math::
      d = \sum_k p_k w_k 1[l_k > z_k]\, g_k, \quad s_k = w_k [l_k - z_k]_+, \qquad
      p \leftarrow \frac{p \odot e^{\eta s}}{\sum_k p_k e^{\eta s_k}} \;\text{(eg)} \quad\text{or}\quad
      p \leftarrow \Pi_\Delta(p + \eta s) \;\text{(pgd)}

    p starts uniform, and d is taken with p before its update. The maximum over p on the simplex is that of `chebyshev`,
    which jumps to one objective, while this moves smoothly. The paper's guarantee is for the uniform average of the
    parameters over all steps t, which your loop can keep: `optax.incremental_update(params, average, 1 / (t + 1))`.

    Cost: one forward and one backward pass over all examples. Logarithms keep `"eg"` from overflowing, and a weight
    that has almost vanished can recover. `"pgd"` sets weights to exactly zero. A large eta gives the worst objective
    all the weight within a few steps. Objectives at or below their ideal gain no weight and have no part in d: with an
    ideal of 0 a negative loss, such as a negated cross-entropy, is ignored.

    Args:
      eta: Step size of the weights.
      variant: `"eg"`, exponentiated gradient, or `"pgd"`, projected gradient.
      weights, ideal: w and z, as in `chebyshev`.
      num_objectives: K, if it is not 2 and no array gives it; needed where the state must keep one shape.

    Returns:
      A transform with a `LossWeightingState` whose memory is an `OmdTchMemory`.

    Raises:
      ValueError: For an unknown variant, a negative eta or weight, arrays of another shape, or missing losses.

    >>> tx = omd_tch(eta=0.5, variant="pgd")
    >>> grads, losses = jnp.eye(2), jnp.array([1.0, 2.0])
    >>> direction, state = tx.update(grads, tx.init(jnp.zeros(2)), losses=losses)
    >>> direction.tolist(), tx.update(grads, state, losses=losses)[0].tolist()
    ([0.5, 0.5], [0.25, 0.75])
    """
    if variant not in _VARIANTS:
        raise ValueError(f"variant: got {variant!r}, expected one of {', '.join(map(repr, _VARIANTS))}")
    check_number("eta", eta, 0, finite=True)
    at_first = count_of(num_objectives, weights=weights, ideal=ideal)
    check_numbers("weights", weights, 0, finite=True)
    check_numbers("ideal", ideal, finite=True)

    def start(k, dtype):
        return OmdTchMemory(jnp.full(k, 1 / k, dtype) if variant == "pgd" else jnp.full(k, -jnp.log(k), dtype))

    def weigh(losses, state):
        dual = state.memory.dual
        values, slopes = excess(losses, weights, ideal)
        moved = dual + jnp.asarray(eta, losses.dtype) * values
        if variant == "pgd":
            return dual * slopes, OmdTchMemory(optax.projections.projection_simplex(moved))
        return jnp.exp(dual) * slopes, OmdTchMemory(jax.nn.log_softmax(moved))

    return from_losses(weigh, num_objectives, memory=start, at_first=at_first)
