"""l1-sparse: fine-tuning that prunes, since a sparse model forgets more easily."""

import chex
import jax
import jax.numpy as jnp

from eupmu_jax.methods.method import (
    LEARNING_RATE,
    MOMENTUM,
    Cost,
    LogUniform,
    Method,
    Procedure,
    descend,
    descent,
    retain_gradient,
)


def l1_sparse(task, terms, settings) -> Procedure:
    r"""Descent on :math:`l_r(\theta) + \alpha_t \|\theta\|_1` over the retain batch.

    .. math:: \alpha_t = \alpha\, (1 - t / T)

    with :math:`\alpha` = `alpha`. The subgradient of the norm at 0 is 0. The norm covers every parameter, scales and
    offsets of normalisation included, as the authors' does, and is clipped together with the retain gradient. They use
    :math:`\alpha` = 1e-4 and an :math:`\alpha_t` that falls from epoch to epoch.

    Failure cases: as in fine-tuning little is forgotten while :math:`\alpha` is small, and the forget set is not read
    at all; a large one prunes what the retained examples need. With clipping, a norm whose gradient
    :math:`\alpha \sqrt n` is above 1 drowns the retain gradient.

    Source: Jia et al. 2023, arXiv 2304.04934.
    """

    def gradient(params, prepared, batches, count, key):
        alpha = settings["alpha"] * (1 - count / terms.steps)
        return add_l1(retain_gradient(task, params, batches[1], key), params, alpha)

    return descend(descent(terms, settings), gradient, Cost((0, 1), (0, 1)))


def add_l1(gradient: chex.ArrayTree, params: chex.ArrayTree, alpha: chex.Numeric) -> chex.ArrayTree:
    """The gradient of a loss plus alpha times the l1 norm of the parameters.

    >>> add_l1(jnp.ones(3), jnp.array([2.0, 0.0, -3.0]), 0.5).tolist()
    [1.5, 1.0, 0.5]
    """
    return jax.tree.map(lambda g, p: g + (alpha * jnp.sign(p)).astype(g.dtype), gradient, params)


METHOD = Method(
    l1_sparse,
    paper="Jia et al. 2023, arXiv 2304.04934",
    passes="1F 1B retain",
    needs="retain set",
    space={"learning_rate": LEARNING_RATE, "alpha": LogUniform(1e-4, 1e-1), "momentum": MOMENTUM},
)
