"""Boundary expand: the forget set is learned as a class of its own, whose output unit is then dropped."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from eupmu_jax import objectives
from eupmu_jax.methods.method import MOMENTUM, Cost, LogUniform, Method, Procedure, descent, size_of


class Unit(NamedTuple):
    """The extra output unit: weights `(num_classes,)` of the logits, and a scalar bias."""

    weights: chex.Array
    bias: chex.Array


def expanded_logits(logits: chex.Array, unit: Unit) -> chex.Array:
    """Logits `(n, K)` and, as column K, that of the unit: an affine function of them.

    >>> expanded_logits(jnp.array([[1.0, 2.0]]), Unit(jnp.array([0.5, -1.0]), jnp.array(3.0))).tolist()
    [[1.0, 2.0, 1.5]]
    """
    # A sum of products, for a matrix unit would round to bfloat16.
    return jnp.concatenate([logits, jnp.sum(logits * unit.weights[None], axis=-1, keepdims=True) + unit.bias], axis=-1)


def boundary_expand(task, terms, settings) -> Procedure:
    r"""Descent on the model and the unit together, with class K as the label of every forget example.

    .. math::
      \min_{\theta, v, b}\; CE\big((z,\; v^\top z + b),\; K\big), \qquad z = z(\theta, x) \text{ of } K \text{ classes}

    The paper adds a unit to the last layer, with random weights on its inputs h. A model here is only a function to K
    logits, so the unit reads those: with z = W h + c it is the paper's with weights :math:`W^\top v`, in the span of
    the K there are. It starts at zero, lives in the state of the run and is discarded with it; the parameters returned
    are those of the model. Defaults of the authors: learning rate 1e-5, momentum 0.9, weight decay 5e-4, 10 epochs.

    Each step passes the forget batch forwards and backwards once; the unit costs next to nothing.

    For classifiers only: it adds a class.

    Failure cases: no retain data hold it back. Nor need the model change if the unit alone can recognise the forget
    set, or answer K to everything, since no other label is ever shown: little is then forgotten once it is dropped.
    """
    optimizer = descent(terms, settings)

    def init(params, prepared):
        unit = Unit(jnp.zeros(task.num_classes), jnp.zeros([]))
        return unit, optimizer.init((params, unit))

    def step(params, prepared, state, batches, count, key):
        unit, optimizer_state = state
        forget = batches[0]
        labels = jnp.full(size_of(forget), task.num_classes)

        def loss(trained):
            logits = expanded_logits(task.outputs(trained[0], forget, key), trained[1])
            return objectives.cross_entropy(logits, labels)

        trained = params, unit
        updates, optimizer_state = optimizer.update(jax.grad(loss)(trained), optimizer_state, trained)
        params, unit = optax.apply_updates(trained, updates)
        return params, (unit, optimizer_state)

    return Procedure(init, step, Cost((1, 0), (1, 0)))


METHOD = Method(
    boundary_expand,
    paper="Chen et al. 2023, arXiv 2303.11570",
    passes="1F 1B forget",
    needs="forget set",
    space={"learning_rate": LogUniform(3e-5, 1e-3), "momentum": MOMENTUM, "weight_decay": LogUniform(1e-6, 1e-2)},
    requires=("num_classes",),
)
