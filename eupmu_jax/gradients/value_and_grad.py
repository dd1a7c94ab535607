"""Gradients of several objectives from one backward pass: stacked for explicit surgery, weighted for implicit."""

from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp

from eupmu_jax._stack.checks import check_real, describe, is_traced
from eupmu_jax.gradients.batches import Loss, Objectives, SharedForward, stack

# Added inside every logarithm of a loss, as the released EUPMU code does: it caps the weight of a vanishing loss.
LOG_OFFSET = 1e-8


def stacked_value_and_grad(loss: Loss, *, has_aux: bool = False, mode: str = "auto") -> Callable:
    r"""Losses and gradients of every objective, in one backward pass over all examples.

    Returns `value_and_grad(params, batches, *args) -> (losses, grads)` with :math:`losses_k = l_k(\theta)` of shape
    `(K,)` and gradient leaves :math:`g_k = \nabla l_k(\theta)` stacked to `(K, *param.shape)`. Like
    `jax.value_and_grad` it is not jitted; call it inside the jitted step.

    Batches come stacked (see `stack_objectives`), or as a tuple of K batches, whose sizes may differ: nine retain
    examples for each forget example, say. `args` (a key, model state) are passed to every objective unchanged.

    Modes:

    * `"vmap"`: one vmapped backward pass, the parameters shared. Batches of different sizes, which vmap would have to
      pad, and plain sequences of losses, which have no common program, are unrolled in the same jitted program; the
      cost is one pass over all examples in every case.
    * `"unroll"`: one backward pass for each objective, side by side in one program.
    * `"auto"`: unroll on CPU, where large matrix products fill the cores one by one and a vmapped convolution becomes a
      grouped one, many times slower; vmap on accelerators, where fewer and larger kernels win.

    Mutable model state (BatchNorm statistics) goes in through `args` or the batch and comes out through `aux`, with an
    objective axis, since every objective normalises with the statistics of its own batch. Keep the retain row,
    `jax.tree.map(lambda leaf: leaf[1], aux)`: the deployed model sees retained data. To leave the statistics alone,
    call the model in evaluation mode.

    Args:
      loss: `loss(params, batch, *args) -> scalar` shared by all objectives; or a sequence of K such functions, forget
        first; or a `shared_forward` for losses that differ only in their heads. Everything is minimised.
      has_aux: If true, losses return `(scalar, aux)` and the result is `((losses, aux), grads)`; aux leaves gain the
        objective axis.
      mode: `"vmap"`, `"unroll"` or `"auto"`.

    Raises:
      ValueError: For an unknown mode, a loss that is not a function, fewer than two objectives, batches of different
        structures, leaves without a common objective axis, a number of losses or heads other than K, a tuple of bare
        arrays of equal shape that could be either a stacked batch or a batch for each objective, complex parameters,
        or a loss that returns something other than a scalar (with `has_aux`, a scalar and aux).

    >>> loss = lambda params, batch: jnp.mean((batch["x"] @ params - batch["y"]) ** 2)
    >>> forget = {"x": jnp.ones((4, 3)), "y": jnp.zeros(4)}
    >>> retain = {"x": jnp.ones((36, 3)), "y": jnp.ones(36)}
    >>> losses, grads = stacked_value_and_grad(loss)(jnp.ones(3), (forget, retain))
    >>> losses.tolist(), grads.shape
    ([9.0, 4.0], (2, 3))
    """
    _check_arguments(loss, mode)

    def value_and_grad(params, batches, *args):
        check_params(params)
        objectives = Objectives(loss, batches, args, has_aux)

        def unrolled(params):
            results = [
                jax.value_and_grad(lambda p, k=k: objectives.evaluate(k, p), has_aux=has_aux)(params)
                for k in range(objectives.count)
            ]
            return stack(results)

        def vmapped(params):
            return objectives.vmap(lambda evaluate: jax.value_and_grad(evaluate, has_aux=has_aux)(params))

        return vmapped(params) if objectives.prefers_vmap(mode) else unrolled(params)

    return value_and_grad


def check_params(params: chex.ArrayTree) -> None:
    """Raises `ValueError` for a parameter that is not a real floating point number."""
    check_real("params", params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(dtype := jnp.result_type(leaf), jnp.floating):
            raise ValueError(
                f"params: leaf {describe(path)} is {dtype}, expected floating point numbers; a quantised base, "
                "counters and keys have no gradient: close over them in the loss, or pass them as args of the step"
            )


def scalarized_value_and_grad(
    loss: Loss, *, has_aux: bool = False, loss_scale: str = "raw", mode: str = "auto"
) -> Callable:
    r"""Losses of every objective and the gradient of their weighted sum, in one backward pass.

    Returns `value_and_grad(params, batches, multipliers, *args) -> (losses, grads)` with `losses` `(K,)`, unweighted,
    and gradients of the parameters' shapes,

    .. math::
      \nabla\Big(l_0 + \sum_k \lambda_k l_k\Big) \;\text{("raw")} \qquad
      \nabla\Big(\log(l_0 + \delta) + \sum_k \lambda_k \log(l_k + \delta)\Big) \;\text{("log")},\quad \delta = 10^{-8}

    Multipliers are not differentiated, and negative ones count as 0. They act in the precision of the losses: a model
    in bfloat16 should return its losses in float32, as those of `objectives` do. In log scale all losses must be
    positive; any other makes the gradients NaN: `implicit_surgery` names it, or inside jit refuses the step.

    Args:
      loss, has_aux: As in `stacked_value_and_grad`; so are the batches.
      loss_scale: `"raw"` or `"log"`.
      mode: `"vmap"` passes batches of equal shapes through the model together, `"unroll"` one after the other; `"auto"`
        vmaps on accelerators.

    Raises:
      ValueError: As `stacked_value_and_grad`; also for an unknown scale, or multipliers of another shape than `(K-1,)`
        (for K = 2 a scalar is accepted).

    >>> loss = lambda params, batch: jnp.mean((params - batch) ** 2)
    >>> from eupmu_jax.gradients.batches import stack_objectives
    >>> batches = stack_objectives(jnp.array([[1.0]]), jnp.array([[3.0]]))
    >>> losses, grads = scalarized_value_and_grad(loss)(jnp.array(0.0), batches, jnp.array([0.5]))
    >>> losses.tolist(), grads.tolist()
    ([1.0, 9.0], -5.0)
    """
    check_loss_scale(loss_scale)
    _check_arguments(loss, mode)

    def value_and_grad(params, batches, multipliers, *args):
        check_params(params)
        objectives = Objectives(loss, batches, args, has_aux)
        multipliers = jnp.asarray(multipliers)
        if multipliers.shape not in ((objectives.count - 1,), () if objectives.count == 2 else None):
            raise ValueError(
                f"multipliers: got shape {multipliers.shape}, expected ({objectives.count - 1},): one for each retain "
                f"constraint; pass num_objectives={objectives.count} to a surgery of {objectives.count} objectives"
            )

        def total(params):
            losses, aux = objectives.values(params, mode=mode)
            weights = jnp.concatenate([jnp.ones(1), jnp.maximum(multipliers, 0).reshape(-1)]).astype(losses.dtype)
            if loss_scale == "log":
                positive = losses > 0
                weights = jnp.where(positive, weights / (jnp.where(positive, losses, 1) + LOG_OFFSET), jnp.nan)
            return jnp.sum(jax.lax.stop_gradient(weights) * losses), (losses, aux)

        (_, (losses, aux)), grads = jax.value_and_grad(total, has_aux=True)(params)
        return ((losses, aux) if has_aux else losses), grads

    return value_and_grad


def retain_losses(
    loss: Loss, params: chex.ArrayTree, batches: Any, *args, has_aux: bool = False, mode: str = "auto"
) -> jax.Array:
    """Losses of the retain objectives alone, `(K-1,)`, without gradients; any aux is dropped.

    This is the `value_fn` of `implicit_surgery`, given the batches and `args` of the step. Arguments are those of
    `scalarized_value_and_grad`.

    >>> loss = lambda params, batch: jnp.mean((params - batch) ** 2)
    >>> retain_losses(loss, jnp.array(0.0), (jnp.ones(2), jnp.full(6, 3.0))).tolist()
    [9.0]
    """
    _check_arguments(loss, mode)
    return Objectives(loss, batches, args, has_aux).values(params, start=1, mode=mode)[0]


def _check_arguments(loss, mode):
    functions = loss.heads if isinstance(loss, SharedForward) else loss if isinstance(loss, Sequence) else (loss,)
    if not all(map(callable, functions)):
        raise ValueError(f"loss: got {loss!r}, expected a function, a sequence of functions or a shared_forward")
    if mode not in ("vmap", "unroll", "auto"):
        raise ValueError(f"mode: got {mode!r}, expected 'vmap', 'unroll' or 'auto'")


def check_loss_scale(loss_scale: str) -> None:
    """Raises `ValueError` unless `loss_scale` is "raw" or "log"."""
    if loss_scale not in ("raw", "log"):
        raise ValueError(f"loss_scale: got {loss_scale!r}, expected 'raw' or 'log'")


def check_positive(losses: chex.Array, step: chex.Numeric) -> None:
    """Raises `ValueError` if a loss in log scale is not positive, naming loss and step; silent on traced values."""
    if is_traced(losses, step):
        return
    for k, value in enumerate(losses):
        if value <= 0:
            name = "forget" if k == 0 else "retain"
            raise ValueError(
                f"losses: got losses[{k}] = {float(value):g} at step {int(step)} ({name}), expected a "
                "positive loss in log scale; use loss_scale='raw' or a forget loss that is bounded below by 0"
            )
