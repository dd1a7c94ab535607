"""SalUn-soft: a proximal step holds most weights at the original ones, and releases them in the course of the run."""

import chex
import jax
import jax.numpy as jnp

from eupmu_jax.gradients.value_and_grad import scalarized_value_and_grad
from eupmu_jax.methods.method import (
    FORGET_OBJECTIVE,
    LEARNING_RATE,
    Choice,
    Cost,
    Method,
    Procedure,
    descent,
    keep_original,
    loss_of,
    size_of,
)


def salun_soft(task, terms, settings) -> Procedure:
    r"""Descent on :math:`l_f + \tfrac{n_r}{n_f}\, l_r`, and a soft threshold of what every step has changed so far.

    .. math::
      \Delta = \theta_t + u_t - \theta_0, \qquad
      \theta_{t+1} = \theta_0 + \operatorname{sign}(\Delta) \max(0, |\Delta| - \tau_t)

    with :math:`\tau_t` the k-th smallest :math:`|\Delta|`, :math:`k = \lfloor s (1 - t/T)\, n \rfloor`, s = `sparsity`
    and n the number of weights: at least k of them are the original ones, to the bit, after step t. Batches are
    weighted as in `salun`.

    The authors' code measures the change from the parameters at the start of each epoch and lowers k once an epoch;
    their paper penalises the distance from the original model. This follows the paper, since a run here may last only a
    few passes over a small forget set.

    Beyond the gradient, a step costs no passes, only 31 counts over all weights, which find the k-th smallest without
    sorting or copying them.

    Failure cases: the threshold shortens the change of every weight in each step, so that a large sparsity forgets
    little before the end. A sparsity of 0 is plain descent.

    Source: Fan et al. 2024, arXiv 2310.12508, appendix.
    """
    value_and_grad = scalarized_value_and_grad(loss_of(task, settings["forget_objective"]))
    optimizer = descent(terms, settings)

    def step(params, original, state, batches, count, key):
        sizes = [size_of(batch) for batch in batches]
        gradient = value_and_grad(params, batches, sizes[1] / sizes[0], key)[1]
        updates, state = optimizer.update(gradient, state, params)
        change = jax.tree.map(lambda p, u, o: p + u - o, params, updates, original)
        total = sum(leaf.size for leaf in jax.tree.leaves(params))
        held = settings["sparsity"] * (1 - count / terms.steps) * total
        change = soft_threshold(change, jnp.floor(held).astype(jnp.int32))
        # Updates of float16 parameters are float32.
        return jax.tree.map(lambda o, d: jnp.where(d == 0, o, (o + d).astype(o.dtype)), original, change), state

    return Procedure(
        lambda params, original: optimizer.init(params),
        step,
        Cost((1, 1), (1, 1)),
        keep_original,
    )


def soft_threshold(tree: chex.ArrayTree, count: chex.Array) -> chex.ArrayTree:
    """Moves all entries towards 0 by the `count`-th smallest magnitude of the tree; no entry passes 0.

    >>> soft_threshold({"a": jnp.array([3.0, -1.0]), "b": jnp.array([-4.0])}, jnp.int32(2))
    {'a': Array([0., 0.], dtype=float32), 'b': Array([-1.], dtype=float32)}
    """
    threshold = kth_smallest(jax.tree.map(jnp.abs, tree), count)
    # A comparison, since x - x may leave a rounding error once it is compiled into other arithmetic.
    shrink = lambda d: jnp.where(jnp.abs(d) <= threshold, 0, d - jnp.sign(d) * threshold.astype(d.dtype))
    return jax.tree.map(shrink, tree)


def kth_smallest(tree: chex.ArrayTree, k: chex.Array) -> chex.Array:
    """The k-th smallest (from 1) of all entries >= 0 of a tree, as float32; 0 for k = 0.

    Bisects on the bits of the floats, whose order is that of non-negative floats.

    >>> float(kth_smallest([jnp.array([5.0, 0.5]), jnp.array([2.0])], 2))
    2.0
    """
    bits = [jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.int32) for leaf in jax.tree.leaves(tree)]

    def with_bit(index, found):
        candidate = found | jnp.left_shift(1, 30 - index)
        smaller = sum(jnp.sum(leaf < candidate) for leaf in bits)
        return jnp.where(smaller < k, candidate, found)

    return jax.lax.bitcast_convert_type(jax.lax.fori_loop(0, 31, with_bit, jnp.int32(0)), jnp.float32)


METHOD = Method(
    salun_soft,
    paper="SalUn-soft, Fan et al. 2024, arXiv 2310.12508",
    passes="1F 1B forget and retain; 31 counts over the weights",
    needs="forget and retain sets",
    space={
        "learning_rate": LEARNING_RATE,
        "forget_objective": FORGET_OBJECTIVE,
        "sparsity": Choice((0.1, 0.3, 0.5, 0.7, 0.9)),
    },
)
