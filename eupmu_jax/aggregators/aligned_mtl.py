"""Aligned-MTL (Senushkin et al. 2023, arXiv 2305.19000, Algorithm 1): principal components rescaled to one length."""

import jax.numpy as jnp
import optax

from eupmu_jax.aggregators._spectrum import apply_to_ones
from eupmu_jax.aggregators._weighting import from_gram

_SCALES = {
    "min": lambda values, rank: values[-rank],
    # For an even number, the lower one of the middle pair.
    "median": lambda values, rank: values[len(values) - rank + (rank - 1) // 2],
    "rmse": lambda values, rank: jnp.sum(jnp.where(jnp.arange(len(values)) >= len(values) - rank, values, 0)) / rank,
}


def aligned_mtl(scale_mode: str = "min", *, num_objectives: int | None = None) -> optax.GradientTransformationExtraArgs:
    r"""The mean of the gradients, after all principal components of their matrix are given one length.

    .. math::
      G = V \Lambda V^\top, \qquad w = \sqrt{\lambda_*}\, V \Lambda^{-1/2} V^\top \tfrac1K 1, \qquad d = \sum_k w_k g_k

    over the r components whose eigenvalue is above rounding, 64 units relative to the largest. The aligned gradients
    are orthogonal and equally long, the nearest such system to the given one, so that none dominates and none conflicts
    with another; to first order the mean of the losses descends, single ones need not.

    Cost: one forward and one backward pass over all examples, and a (K, K) eigenproblem. Opposite or parallel gradients
    span one component, and d is their mean, 0 if they cancel. A zero gradient is left out of the sum, but not of K.
    Gradients shorter than 3e-3 of the longest in float32, or 1e-7 in float64, fall below the rank threshold.

    Args:
      scale_mode: :math:`\lambda_*` from the eigenvalues that count: their `"min"`, the default of the paper and of
        TorchJD; their `"median"`; or their mean, `"rmse"`.
      num_objectives: K, if it is not 2; needed where the state must keep one shape.

    Returns:
      A transform with a `WeightingState`.

    Raises:
      ValueError: For an unknown scale mode.

    >>> tx = aligned_mtl()
    >>> tx.update(jnp.array([[-4.0, 0.0], [0.0, 1.0]]), tx.init(jnp.zeros(2)))[0].tolist()
    [-0.5, 0.5]
    """
    if scale_mode not in _SCALES:
        raise ValueError(f"scale_mode: got {scale_mode!r}, expected one of {', '.join(map(repr, _SCALES))}")

    def factors(values, rank):
        return jnp.sqrt(_SCALES[scale_mode](values, jnp.maximum(rank, 1)) / values)

    return from_gram(lambda gram: apply_to_ones(gram, factors) / len(gram), num_objectives)
