"""The mean of the objectives' gradients: linear scalarisation, and the plainest baseline."""

import jax.numpy as jnp
import optax

from eupmu_jax.aggregators._weighting import from_gram


def mean(*, num_objectives: int | None = None) -> optax.GradientTransformationExtraArgs:
    r"""Weights all objectives equally.

    .. math::
      d = \frac1K \sum_k g_k

    Guarantee: the mean loss descends; a single loss may not. Cost: nothing beyond the stacked gradients; if this is all
    you need, the gradient of the mean loss is the same and needs no stack.

    Args:
      num_objectives: K, if it is not 2; needed where the state must keep one shape.

    Returns:
      A transform with a `WeightingState`.

    >>> tx = mean()
    >>> tx.update(jnp.array([[-1.0, 1.0], [1.0, 0.0]]), tx.init(jnp.zeros(2)))[0].tolist()
    [0.0, 0.5]
    """
    return from_gram(lambda gram: jnp.full(len(gram), 1 / len(gram), gram.dtype), num_objectives)
