"""Boundary shrink: every forget example is relearned as the class behind its nearest decision boundary."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from eupmu_jax import objectives
from eupmu_jax.methods.method import MOMENTUM, Cost, LogUniform, Method, Procedure, descend, descent
from eupmu_jax.tasks.examples import spread

# The most forget examples whose range is checked.
CHECKED = 1_000


def nearest_wrong_labels(
    outputs: Callable, params: chex.ArrayTree, batch: dict, bound: chex.Numeric, key: chex.PRNGKey | None = None
) -> chex.Array:
    r"""The best wrong class after one step of the fast gradient sign method (FGSM).

    .. math::
      x' = \mathrm{clip}(x + \epsilon\, \mathrm{sign}\, \nabla_x\, CE(\theta, x, y),\, 0,\, 1), \qquad
      y' = \arg\max_{k \ne y} z_k(\theta, x')

    Args:
      outputs, params: The model, see `Task`.
      batch: `inputs` of shape `(n, ...)` in [0, 1] and `labels` `(n,)`.
      bound: epsilon, the largest change of an input.
      key: For `outputs`.

    Returns:
      `(n,)` labels, nowhere equal to the true ones. This takes two forward passes and a backward pass to the inputs.

    >>> logits = lambda params, batch, key: batch["inputs"] @ params
    >>> batch = {"inputs": jnp.array([[0.9, 0.5, 0.6]]), "labels": jnp.array([0])}
    >>> nearest_wrong_labels(logits, jnp.eye(3), batch, 0.1).tolist()
    [2]
    """
    inputs, labels = batch["inputs"], batch["labels"]
    apply = lambda x: outputs(params, batch | {"inputs": x}, key)
    ascent = jax.grad(lambda x: objectives.cross_entropy(apply(x), labels))(inputs)
    logits = apply(jnp.clip(inputs + bound * jnp.sign(ascent), 0.0, 1.0))
    is_truth = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    return jnp.argmax(jnp.where(is_truth, -jnp.inf, logits), axis=-1)


def boundary_shrink(task, terms, settings) -> Procedure:
    r"""Descent on :math:`CE(\theta, x, y')` over forget examples alone, with y' from the original model.

    y' is `nearest_wrong_labels` with epsilon = `bound`. The paper takes the class predicted for x', whether or not x'
    crossed a boundary, so y' may be the true class and teach what should be forgotten; here it is the best of the
    others. Inputs must lie in [0, 1]: if any of 1,000 examples, spread over the forget set, do not, a run raises
    `ValueError`. The authors round x' to 8 bits; epsilon is 0.1 and the learning rate 1e-5.

    A step costs the original model two forward passes and a backward pass to the inputs, and the student one of each.
    The backward pass to the inputs makes no gradients of parameters, but is counted as a whole one.

    For classifiers only: it looks for the class behind the nearest boundary.

    Failure cases: no retain data hold it back, so large learning rates ruin the model. One step of FGSM finds the
    nearest boundary of a linear model with two classes; with more classes or a curved boundary it is a guess. y' may be
    another class that is to be forgotten. Where the model is so sure that its input gradient underflows to 0, x' = x
    and y' is the runner-up.
    """

    def gradient(params, original, batches, count, key):
        forget = batches[0]
        labels = nearest_wrong_labels(task.outputs, original, forget, settings["bound"], key)
        return jax.grad(lambda p: objectives.cross_entropy(task.outputs(p, forget, key), labels))(params)

    def prepare(params, forget, retain, key):
        _check_inputs(forget[spread(len(forget), CHECKED)]["inputs"])
        return params

    return descend(descent(terms, settings), gradient, Cost((3, 0), (2, 0)), prepare)


def _check_inputs(inputs):
    dtype = getattr(inputs, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"forget: got inputs of {dtype or type(inputs).__name__}, expected an array of floats in [0, 1]"
        )
    least, most = float(jnp.min(inputs)), float(jnp.max(inputs))
    if not 0 <= least <= most <= 1:
        raise ValueError(f"forget: got inputs from {least:g} to {most:g}, expected numbers in [0, 1]")


METHOD = Method(
    boundary_shrink,
    paper="Chen et al. 2023, arXiv 2303.11570",
    passes="3F 2B forget, including the original model's 2F and 1B to the inputs",
    needs="forget set, inputs in [0, 1]",
    space={"learning_rate": LogUniform(3e-5, 1e-3), "bound": LogUniform(0.01, 0.3), "momentum": MOMENTUM},
    requires=("num_classes",),
)
