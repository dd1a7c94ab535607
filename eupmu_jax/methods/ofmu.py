"""OFMU: ascent on the forget loss, away from the retain gradient, inside a penalised descent on the retain loss."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import optax

from eupmu_jax._stack import algebra
from eupmu_jax.gradients.batches import stack
from eupmu_jax.methods.method import Cost, LogUniform, Method, Procedure, descent

# Ascent steps before each descent; the paper takes 5 to 10, each as expensive as three plain steps.
INNER_STEPS = 2


def cosine_weights(gram: chex.Array) -> chex.Array:
    r"""Derivatives of the cosine of two gradients with respect to each, as weights of the two: row i is for g_i.

    .. math::
      \frac{\partial c}{\partial g_i} = \frac{g_j}{|g_i||g_j|} - c\, \frac{g_i}{|g_i|^2}, \qquad
      c = \frac{\langle g_i, g_j \rangle}{|g_i||g_j|}

    Args:
      gram: `(2, 2)` Gram matrix. If a gradient is zero there is no cosine, and all weights are 0.

    >>> cosine_weights(jnp.array([[4.0, 2.0], [2.0, 4.0]])).tolist()
    [[-0.125, 0.25], [0.25, -0.125]]
    """
    squares = jnp.diagonal(gram)
    defined = jnp.all(squares > 0)
    squares = jnp.where(defined, squares, 1.0)
    norms = jnp.sqrt(squares)
    # One root after the other, since a product of small squares would underflow.
    cross, cosine = 1 / norms[0] / norms[1], gram[0, 1] / norms[0] / norms[1]
    weights = jnp.stack([jnp.stack([-cosine / squares[0], cross]), jnp.stack([cross, -cosine / squares[1]])])
    return jnp.where(defined, weights, 0.0)


def directions(
    forget_loss: Callable, retain_loss: Callable, params: chex.ArrayTree, beta: chex.Numeric, rho: chex.Numeric
) -> tuple[chex.ArrayTree, chex.ArrayTree]:
    r"""The gradients of the inner and of the outer problem.

    .. math::
      \nabla \Phi = g_f - \beta \nabla c, \quad
      \nabla c = H_f \frac{\partial c}{\partial g_f} + H_r \frac{\partial c}{\partial g_r}, \qquad
      \nabla F \approx g_r + 2 \rho H_f \nabla \Phi

    Hessian-vector products are forward-over-reverse: the derivative of a gradient along a vector. The outer one holds
    :math:`\nabla c` constant, since its exact derivative contains third derivatives of the losses.

    Args:
      forget_loss, retain_loss: Functions of the parameters alone.
      params: Where to take the gradients.
      beta, rho: Weights of the cosine and of the penalty.

    Returns:
      Two trees like `params`, to ascend and to descend.

    >>> def square(scale):
    ...     return lambda x: 0.5 * scale * jnp.sum(x**2)
    >>> [leaf.tolist() for leaf in directions(square(2.0), square(1.0), jnp.array([1.0]), 0.3, 0.5)]
    [[2.0], [5.0]]
    """
    forget_gradient, forget_product = jax.linearize(jax.grad(forget_loss), params)
    retain_gradient, retain_product = jax.linearize(jax.grad(retain_loss), params)
    gradients = stack([forget_gradient, retain_gradient])
    by_forget, by_retain = cosine_weights(algebra.gram_matrix(gradients))
    cosine_gradient = jax.tree.map(
        jnp.add,
        forget_product(algebra.combine(gradients, by_forget, params)),
        retain_product(algebra.combine(gradients, by_retain, params)),
    )
    inner = jax.tree.map(lambda g, c: (g - beta * c).astype(g.dtype), forget_gradient, cosine_gradient)
    curved = forget_product(inner)
    return inner, jax.tree.map(lambda g, h: (g + 2 * rho * h).astype(g.dtype), retain_gradient, curved)


def ofmu(task, terms, settings) -> Procedure:
    r"""Two ascent steps on the inner problem, then one descent step on the outer problem from where they end.

    .. math::
      \Phi = l_F - \beta \cos(\nabla l_F, \nabla l_R), \qquad F = l_R + \rho_t |\nabla \Phi|^2

    with the gradients of `directions`. :math:`l_F` is minus the task's `bounded_ascent`, for a classifier the forget
    batch's cross-entropy up to ln C, that of a uniform guess, so that ascent leaves alone what is forgotten.
    :math:`\rho_t` rises linearly to `rho` at the end of the run.

    The paper states 5 to 10 inner steps and a rising penalty, but neither beta nor the penalties; one learning rate
    serves both problems, as there. Every step, inner or outer, is clipped like a step of any other method. Steps are
    those of SGD: moments, momentum or a decay would mix the two problems.

    A gradient costs a forward and a backward pass. A Hessian-vector product differentiates both, a product of two
    factors into two, and so costs two of each. An inner step takes a gradient and a product on both batches, the outer
    one another product on the forget batch: 11F 11B forget and 9F 9B retain in all.

    Failure cases: if either gradient is zero there is no cosine, and its term is 0. The derivative of the cosine with
    respect to a gradient grows with the inverse of its norm, so near a minimum of :math:`l_R`, where a trained model
    is, the cosine outweighs everything unless beta is small. A piecewise linear model has a Hessian only through its
    softmax.
    """
    optimizer = descent(terms, {"learning_rate": settings["learning_rate"], "optimizer": "sgd"})

    def step(params, prepared, state, batches, count, key):
        forget, retain = batches

        def forget_loss(p):
            return -task.forget["bounded_ascent"](task.outputs(p, forget, key), forget)

        def retain_loss(p):
            return task.retain(task.outputs(p, retain, key), retain)

        def at(p):
            rho = settings["rho"] * (count + 1) / terms.steps
            return directions(forget_loss, retain_loss, p, settings["beta"], rho)

        def ascend(_, p):
            # The state only counts steps for the schedule, and an inner step is not one.
            updates, _ = optimizer.update(jax.tree.map(jnp.negative, at(p)[0]), state, p)
            return optax.apply_updates(p, updates)

        params = jax.lax.fori_loop(0, INNER_STEPS, ascend, params)
        updates, state = optimizer.update(at(params)[1], state, params)
        return optax.apply_updates(params, updates), state

    passes = 3 * INNER_STEPS + 5, 3 * INNER_STEPS + 3
    return Procedure(lambda params, prepared: optimizer.init(params), step, Cost(passes, passes))


METHOD = Method(
    ofmu,
    paper="OFMU, arXiv 2509.22483",
    passes="11F 11B forget, 9F 9B retain, counting a Hessian-vector product as 2F 2B",
    needs="forget and retain sets",
    space={"learning_rate": LogUniform(0.03, 1.0), "beta": LogUniform(0.01, 1.0), "rho": LogUniform(0.01, 1.0)},
    forget=("bounded_ascent",),
    optimizer_settings=(),
)
