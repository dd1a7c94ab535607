"""SalUn: only the weights that the forget set's loss depends on most may move."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from eupmu_jax.gradients.value_and_grad import scalarized_value_and_grad
from eupmu_jax.methods._whole_set import largest_pass, mean_gradient
from eupmu_jax.methods.method import (
    FORGET_OBJECTIVE,
    LEARNING_RATE,
    Choice,
    Cost,
    Method,
    Procedure,
    descent,
    loss_of,
    size_of,
)


def salun(task, terms, settings) -> Procedure:
    r"""Descent on :math:`l_f + \tfrac{n_r}{n_f}\, l_r`, restricted to the weights of a mask.

    .. math::
      m_i = 1 \;\text{ if }\; |\nabla_i\, l(\theta_0; \text{forget})| \text{ is among the } \lfloor p\, n \rfloor
      \text{ largest of all weights}, \qquad \theta_{t+1} = \theta_t + m \odot u(m \odot g_t)

    with p = `mask_fraction`, n the number of weights, u the optimizer and n_f, n_r the sizes of the two batches, so
    that every example weighs the same, as in the authors' mixed batches. The authors use p = 0.5 and, for classifiers,
    the forget loss `random_labels`; here the forget loss is a setting, as for other methods, and is searched.

    Weights outside the mask are unchanged to the bit: clipping and momentum see masked gradients only, and what
    momentum or weight decay would still move is dropped at the end.

    Before the first step, one forward and backward pass over the forget set, and a sort of all weights.

    Failure cases: a mask of few weights may leave out some that have to change. Weights without any gradient (dead
    units) tie; ties go to the weight that comes first in the tree, so that exactly :math:`\lfloor p\, n \rfloor`
    weights move. l is the retain loss: if that is a distance to the original model, such as a KL divergence, its
    gradient there is 0, and rounding decides which weights move. A run warns of that.

    Source: Fan et al. 2024, arXiv 2310.12508.
    """
    value_and_grad = scalarized_value_and_grad(loss_of(task, settings["forget_objective"]))
    optimizer = descent(terms, settings)

    def prepare(params, forget, retain, key):
        return saliency_mask(mean_gradient(task, params, forget), settings["mask_fraction"])

    def step(params, mask, state, batches, count, key):
        sizes = [size_of(batch) for batch in batches]
        gradient = value_and_grad(params, batches, sizes[1] / sizes[0], key)[1]
        masked = jax.tree.map(lambda kept, g: jnp.where(kept, g, 0), mask, gradient)
        updates, state = optimizer.update(masked, state, params)
        moved = optax.apply_updates(params, updates)
        return jax.tree.map(lambda kept, to, p: jnp.where(kept, to, p), mask, moved, params), state

    return Procedure(
        lambda params, mask: optimizer.init(params),
        step,
        Cost((1, 1), (1, 1), outside_forward=terms.num_forget, outside_backward=terms.num_forget),
        prepare,
        outside=(largest_pass(task, terms.num_forget),),
    )


def saliency_mask(gradient: chex.ArrayTree, fraction: chex.Numeric) -> chex.ArrayTree:
    """Tree of bools, True for the `floor(fraction * n)` entries of largest magnitude among all n of the tree.

    Ties, including zeros, go to the entry that comes first.

    >>> mask = saliency_mask({"a": jnp.array([3.0, 0.0]), "b": jnp.array([[-5.0, 0.0, 1.0]])}, 0.8)
    >>> mask["a"].tolist(), mask["b"].tolist()
    ([True, True], [[True, False, True]])
    """
    count = sum(leaf.size for leaf in jax.tree.leaves(gradient))
    # The binary rounding of a fraction such as 0.7 must not cost a weight.
    return _largest(gradient, math.floor(float(fraction) * count + 1e-6))


@jax.jit
def _largest(tree, count):
    leaves, structure = jax.tree.flatten(tree)
    magnitudes = jnp.concatenate([jnp.abs(leaf).ravel() for leaf in leaves])
    order = jnp.argsort(magnitudes, descending=True, stable=True)
    mask = jnp.zeros(magnitudes.size, bool).at[order].set(jnp.arange(magnitudes.size) < count)
    parts = jnp.split(mask, np.cumsum([leaf.size for leaf in leaves])[:-1])
    return jax.tree.unflatten(structure, [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)])


METHOD = Method(
    salun,
    paper="SalUn, Fan et al. 2024, arXiv 2310.12508",
    passes="1F 1B forget and retain, masked; before the first step 1F 1B of the whole forget set",
    needs="forget and retain sets",
    space={
        "learning_rate": LEARNING_RATE,
        "forget_objective": FORGET_OBJECTIVE,
        "mask_fraction": Choice((0.1, 0.3, 0.5, 0.7, 0.9)),
    },
    slope=True,
)
