"""ZO-signGD: descent where losses can be evaluated but gradients cannot."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import optax

from eupmu_jax.methods.method import (
    FORGET_OBJECTIVE,
    Cost,
    LogUniform,
    Method,
    Procedure,
    complete,
    descend,
    descent,
    loss_of,
)

# Two evaluations each: 8 forward passes of both batches cost about as much as 2.7 steps of one gradient.
DIRECTIONS = 4
SMOOTHING = 1e-3


def zeroth_order(task, terms, settings) -> Procedure:
    r"""Steps along the sign of a gradient estimated from differences of :math:`L = l_f + w\, l_r`, w = `retain_weight`.

    .. math::
      \rho_j = \frac{L(\theta + \mu z_j) - L(\theta - \mu z_j)}{2 \mu}, \quad z_j \sim N(0, I), \qquad
      \theta_{t+1} = \theta_t - \frac{\alpha_t}{\sqrt n} \operatorname{sign}\Big( \frac1q \sum_{j=1}^q \rho_j z_j \Big)

    with q = 4, :math:`\mu` = `smoothing`, 1e-3 by default, and the n weights of the model. The usual clipping to norm 1
    gives the :math:`1/\sqrt n`: a step is as long as the learning rate. Both evaluations share their batches. A step
    takes 2q forward passes and no backward pass, and holds one direction in memory at a time.

    Of the two variants in use, this one takes the sign of each coordinate; the other is sign(rho) z, for one direction.

    Failure cases: the estimate's error grows with n / q, so large models need far more steps than first-order
    methods. A difference that rounds to 0, because mu is too small for the loss's precision, gives no step.

    Source: Liu et al. 2019, signSGD via zeroth-order oracle, Algorithm 1.
    """
    loss = loss_of(task, settings["forget_objective"])

    def gradient(params, prepared, batches, count, key):
        # The keys before it are those of the directions.
        loss_key = jax.random.fold_in(key, DIRECTIONS)

        def objective(params):
            values = (head(loss.forward(params, b, loss_key), b) for head, b in zip(loss.heads, batches, strict=True))
            forget, retain = values
            return forget + settings["retain_weight"] * retain

        return jax.tree.map(jnp.sign, estimate(objective, params, key, settings.get("smoothing", SMOOTHING)))

    optimizer = descent(terms, complete({**settings, "optimizer": "sgd"}))
    return descend(optimizer, gradient, Cost((2 * DIRECTIONS, 2 * DIRECTIONS), (0, 0)))


def estimate(
    loss: Callable, params: chex.ArrayTree, key: chex.PRNGKey, smoothing: chex.Numeric, directions: int = DIRECTIONS
) -> chex.ArrayTree:
    """The mean of rho z over some directions: its expectation is the gradient of the loss smoothed by N(0, mu^2 I).

    >>> float(estimate(lambda x: 3.0 * x, jnp.array(1.0), jax.random.key(0), 0.01, directions=1)) > 0
    True
    """

    def add(total, key):
        z = optax.tree_utils.tree_random_like(key, params, jax.random.normal)
        moved = lambda length: loss(jax.tree.map(lambda p, d: (p + length * d).astype(p.dtype), params, z))
        rho = (moved(smoothing) - moved(-smoothing)) / (2 * smoothing)
        return jax.tree.map(lambda t, d: (t + rho * d / directions).astype(t.dtype), total, z), None

    return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), jax.random.split(key, directions))[0]


METHOD = Method(
    zeroth_order,
    paper="Liu et al. 2019, signSGD via zeroth-order oracle",
    passes=f"{2 * DIRECTIONS}F forget and retain",
    needs="losses on forget and retain sets",
    space={
        "learning_rate": LogUniform(0.1, 3.0),
        "forget_objective": FORGET_OBJECTIVE,
        "retain_weight": LogUniform(0.3, 30.0),
    },
    optional=("smoothing",),
    optimizer_settings=("momentum", "weight_decay"),
)
