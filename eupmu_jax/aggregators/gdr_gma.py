"""GDR-GMA (Lin et al., ACM Multimedia 2024): gradients rectified against each other, and mixed by the retain loss."""

import chex
import jax
import jax.numpy as jnp
import optax

from eupmu_jax._stack import algebra, checks, refusal
from eupmu_jax.aggregators._weighting import WeightingState

_PROJECTIONS = ("sequential", "clean")


def gdr_gma(
    gamma: float = 100.0, epsilon: float = 0.02, projection: str = "sequential"
) -> optax.GradientTransformationExtraArgs:
    r"""Projects both gradients off each other in each parameter tensor, weighted by how good the model still is.

    .. math::
      g_r' = g_r - \frac{\pi}{\|g_f\|^2} g_f, \quad g_f' = g_f - \frac{\pi}{\|g_r\|^2} g_r', \quad
      \pi = \min(0, \langle g_r, g_f\rangle) \qquad \text{in each tensor}

    .. math::
      d = (1 - \lambda) g_r' + \lambda g_f', \qquad \lambda = \operatorname{sigmoid}(-\gamma (l_r - \epsilon))

    Forgetting has all the weight while the retain loss is well below epsilon, none when it is well above. As published
    (`"sequential"`), :math:`g_f'` subtracts the new :math:`g_r'` and keeps a conflict,
    :math:`\langle g_f', g_r\rangle = \pi \cos^2`; `"clean"` projects both from the originals, so that within every
    tensor neither conflicts with the other's original.

    Left out: the authors' memory bank, which rectifies the last tensor's forget gradient once more, from the second
    epoch on, by the mean of its past values that conflict with it.

    Cost: one forward and one backward pass over all examples. On a mesh each tensor has an all-reduce of its own. For
    two objectives only. A tensor whose gradient is zero in either row conflicts with nothing; opposite gradients give
    0 for `"clean"`, and for `"sequential"` :math:`\lambda g_f`.

    Args:
      gamma: Sharpness of the switch.
      epsilon: Retain loss at which both gradients have weight 1/2.
      projection: `"sequential"` or `"clean"`.

    Returns:
      A transform with `update(updates, state, params=None, *, losses, **extra_args)`, stacked tree in,
      parameter-shaped tree out, and a `WeightingState`: weights are those of the rectified rows,
      :math:`(\lambda, 1 - \lambda)`. A step that is not finite gives zeros and changes nothing but `nonfinite_count`.

    Raises:
      ValueError: For an unknown projection, a negative gamma, numbers that are not finite, K other than 2, or missing
        losses.

    >>> tx = gdr_gma()
    >>> grads, losses = jnp.array([[-1.0, 1.0], [1.0, 0.0]]), jnp.array([3.0, 0.02])
    >>> tx.update(grads, tx.init(jnp.zeros(2)), losses=losses)[0].tolist()
    [0.0, 1.0]
    """
    if projection not in _PROJECTIONS:
        raise ValueError(f"projection: got {projection!r}, expected one of {', '.join(map(repr, _PROJECTIONS))}")
    checks.check_number("gamma", gamma, 0, finite=True)
    checks.check_number("epsilon", epsilon, finite=True)

    def init_fn(params):
        dtype = algebra.accumulator_dtype(params)
        return WeightingState(jnp.zeros(2, dtype), jnp.zeros((2, 2), dtype), *refusal.counters())

    def update_fn(updates, state, params=None, *, losses=None, **extra_args):
        del extra_args
        if (k := checks.count_objectives(updates, params)) != 2:
            raise ValueError(f"updates: got {k} objectives, expected 2: one forget and one retain gradient")
        losses = checks.check_losses(losses, k, needed=True)
        excess = jnp.asarray(gamma, state.weights.dtype) * (epsilon - losses[1])
        weights = jax.nn.sigmoid(jnp.stack([excess, -excess]))

        leaves, structure = jax.tree.flatten(updates)
        grams = [algebra.gram_matrix([leaf]) for leaf in leaves]
        outputs = leaves if params is None else jax.tree.leaves(params)
        combined = [
            algebra.combine(leaf, _rectify(gram, weights, projection), output)
            for leaf, gram, output in zip(leaves, grams, outputs, strict=True)
        ]
        gram = sum(grams)
        finite = algebra.all_finite((gram, losses, weights))
        direction = jax.tree.unflatten(structure, combined)
        return refusal.settle(finite, direction, state._replace(weights=weights, gram=gram), state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _rectify(gram: chex.Array, weights: chex.Array, projection: str) -> chex.Array:
    """Weights `(2,)` of a tensor's two rows, from those of its rectified rows."""
    conflict = jnp.minimum(gram[0, 1], 0)
    # Subtracted multiples: of the forget row from the retain row, and of the retain row from the forget row.
    of_forget, of_retain = conflict / jnp.where(jnp.diagonal(gram) > 0, jnp.diagonal(gram), 1)
    forget_row = jnp.stack([jnp.ones_like(conflict), -of_retain])
    if projection == "sequential":
        forget_row = forget_row + jnp.stack([of_forget * of_retain, jnp.zeros_like(conflict)])
    retain_row = jnp.stack([-of_forget, jnp.ones_like(conflict)])
    return weights[0] * forget_row + weights[1] * retain_row
