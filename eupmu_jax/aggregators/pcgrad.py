"""PCGrad (Yu et al. 2020, arXiv 2001.06782, Algorithm 1): every gradient projected off those it conflicts with."""

import jax
import jax.numpy as jnp
import optax

from eupmu_jax._stack.checks import check_int
from eupmu_jax.aggregators._weighting import from_gram


def pcgrad(seed: int | None = None, *, num_objectives: int | None = None) -> optax.GradientTransformationExtraArgs:
    r"""Removes from each gradient, one after the other, its component along every gradient that it conflicts with.

    .. math::
      d = \sum_i g_i', \qquad
      g_i' \leftarrow g_i' - \frac{\min(0, \langle g_i', g_j\rangle)}{\|g_j\|^2} g_j \;\text{ for all } j \ne i,
      \text{ from } g_i' = g_i

    For K = 2 it is the sum of both unilateral surgeries with tolerance 0 (the forget row of PCGrad is
    `unilateral_surgery(0.0)`), twice `upgrad`, and no loss rises to first order. For K > 2 the last projection of a row
    can undo those before it, so that no such guarantee holds, and their order matters.

    Cost: the stacked gradients, one forward and one backward pass over all examples; K(K-1) projections of K numbers.
    A zero gradient conflicts with nothing. Parallel gradients are summed; opposite ones give d = 0.

    Args:
      seed: None projects in the order of the rows, forget first. A number draws a new order for every row's projections
        in each step, as the paper does, from this seed and the step count.
      num_objectives: K, if it is not 2; needed where the state must keep one shape.

    Returns:
      A transform with a `WeightingState`.

    Raises:
      ValueError: For a seed that is not an int of at least 0.

    >>> tx = pcgrad()
    >>> tx.update(jnp.array([[-1.0, 1.0], [1.0, 0.0]]), tx.init(jnp.zeros(2)))[0].tolist()
    [0.5, 1.5]
    """
    if seed is not None:
        check_int("seed", seed, 0)

    def weigh(gram, count):
        k = len(gram)
        orders = jnp.tile(jnp.arange(k), (k, 1))
        if seed is not None:
            keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), count), k)
            orders = jax.vmap(lambda key: jax.random.permutation(key, k))(keys)
        return jax.vmap(lambda i, order: _project(gram, i, order))(jnp.arange(k), orders).sum(axis=0)

    return from_gram(weigh, num_objectives, with_count=True)


def _project(gram, i, order):
    """Weights `(K,)` of row i after its projections."""

    def project(j, weights):
        squared_norm = gram[j, j]
        conflict = jnp.minimum(jnp.sum(gram[j] * weights), 0) / jnp.where(squared_norm > 0, squared_norm, 1)
        return weights.at[j].add(-jnp.where(j == i, 0, conflict))

    # Made from the data, to vary over devices inside `shard_map` as the rest does.
    weights = jnp.where(jnp.arange(len(gram)) == i, jnp.ones_like(gram[0]), 0)
    return jax.lax.fori_loop(0, len(gram), lambda step, weights: project(order[step], weights), weights)
