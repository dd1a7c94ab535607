"""Training steps that pass losses and `value_fn` to the optimizer, which Flax's TrainState cannot do."""

import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import optax

from eupmu_jax import sharding
from eupmu_jax._stack.checks import as_transform, check_same_shapes
from eupmu_jax.gradients.batches import Loss
from eupmu_jax.gradients.value_and_grad import retain_losses, scalarized_value_and_grad, stacked_value_and_grad
from eupmu_jax.surgery import _chains
from eupmu_jax.surgery.implicit import multipliers


def explicit_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    has_aux: bool = False,
    mode: str = "auto",
    shardings: chex.ArrayTree | None = None,
    gradient_dtype: jax.typing.DTypeLike | None = None,
    errors: Callable | None = None,
) -> Callable:
    """A step with stacked gradients: `step(params, state, batches, *args, levels=None) -> (params, state, losses)`.

    Args:
      loss, has_aux, mode: As in `stacked_value_and_grad`.
      optimizer: A chain that begins with a stacked transform such as `unilateral_surgery`.
      shardings: On a mesh, the parameters' `NamedSharding`s: the stacked gradients are kept in the same layout, and
        their Gram matrix takes one all-reduce of K(K+1)/2 numbers (`sharding.gram_matrix`). None leaves both to XLA,
        which gives the same result.
      gradient_dtype: `jnp.bfloat16` differentiates with respect to a bfloat16 copy of the parameters, which halves the
        memory of the stacked gradients. Gram matrix, multipliers and optimizer keep float32.
      errors: `errors(aux) -> (K,)`, with `has_aux`: the part of the aux that the optimizer receives as `errors`, for
        `controllers.forget_level` and `retain_limit`: one figure for each objective's batch, such as its error rate.

    Returns:
      The step, to be jitted (with `donate_argnums=(0, 1)`) or scanned. `losses` is `(K,)`, before the step; with
      `has_aux` it is `(losses, aux)`. `levels` `(K-1,)`, if given, are passed to the optimizer's tolerance. The
      optimizer also receives a `value_fn` that evaluates the retain losses on the step's own batch, for a
      `utility_guard` that measures or a `scale_by_gen`. Other keywords, such as `value` for
      `optax.contrib.reduce_on_plateau`, are passed to the optimizer unchanged.

    Raises:
      ValueError: For `errors` without `has_aux`. When traced: if the optimizer's updates do not have the parameters'
        shapes because nothing collapsed the stack; if a transform before the surgery kept stacked moments; if the
        optimizer holds `implicit_surgery` instead; or if `optax.MultiSteps`, `optax.apply_if_finite`,
        `optax.conditionally_mask` or `optax.conditionally_transform` wraps the surgery. Also as
        `stacked_value_and_grad`.

    >>> from eupmu_jax import unilateral_surgery
    >>> forget, retain = (lambda w, batch: jnp.mean((w - batch) ** 2) for _ in range(2))
    >>> optimizer = optax.chain(unilateral_surgery(), optax.sgd(0.25))
    >>> step = jax.jit(explicit_step([forget, retain], optimizer))
    >>> w, state, losses = step(0.0, optimizer.init(0.0), (jnp.ones(3), jnp.full(9, 2.0)))
    >>> float(w), losses.tolist()
    (0.5, [1.0, 4.0])
    """
    if errors is not None and not has_aux:
        raise ValueError(
            "errors: got a function of the aux, but has_aux=False; expected losses that return (loss, aux)"
        )
    optimizer = as_transform("optimizer", optimizer)
    value_and_grad = stacked_value_and_grad(loss, has_aux=has_aux, mode=mode)
    gram_fn = None if shardings is None else functools.partial(sharding.gram_matrix, shardings=shardings)

    def cast(leaf):
        return jnp.asarray(leaf, gradient_dtype) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating) else leaf

    def step(params, state, batches, *args, levels=None, **extra_args):
        _chains.check_explicit(state)
        value, grads = value_and_grad(params if gradient_dtype is None else jax.tree.map(cast, params), batches, *args)
        if shardings is not None:
            grads = jax.lax.with_sharding_constraint(grads, sharding.stacked_shardings(shardings))
        losses = value[0] if has_aux else value
        value_fn = lambda new_params: retain_losses(loss, new_params, batches, *args, has_aux=has_aux, mode=mode)
        extra = {} if errors is None else {"errors": errors(value[1])}
        updates, new_state = optimizer.update(
            grads,
            state,
            params,
            losses=losses,
            levels=levels,
            value_fn=value_fn,
            gram_fn=gram_fn,
            **extra,
            **extra_args,
        )
        _chains.check_collapsed(updates, params, new_state, state)
        return optax.apply_updates(params, updates), new_state, value

    return step


def implicit_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    has_aux: bool = False,
    loss_scale: str = "raw",
    mode: str = "auto",
) -> Callable:
    """A step with one scalarised gradient: `step(params, state, batches, *args, levels=None)`, as `explicit_step`'s.

    The retain losses after the step are evaluated on the step's own batch and `args` (keys and noise included), and
    anything else that the model returns (BatchNorm statistics) is dropped. The `next_batch` proxy does not need them,
    so no second forward pass is made.

    Args:
      loss, has_aux, loss_scale, mode: As in `scalarized_value_and_grad`.
      optimizer: A chain that ends with `implicit_surgery` or `reference_surgery` of the same loss scale.

    Returns:
      As `explicit_step`.

    Raises:
      ValueError: When traced: if the optimizer holds a stacked transform and no `implicit_surgery`; if anything follows
        a surgery with the `same_batch` proxy in a chain, as the surgery would then measure the wrong parameters; or if
        the updates do not have the parameters' shapes. Also as `scalarized_value_and_grad`.

    >>> from eupmu_jax import eupmu
    >>> forget, retain = (lambda w, batch: jnp.mean((w - batch) ** 2) for _ in range(2))
    >>> optimizer = eupmu(0.25)
    >>> step = jax.jit(implicit_step([forget, retain], optimizer))
    >>> w, state, losses = step(0.0, optimizer.init(0.0), (jnp.ones(3), jnp.full(9, 2.0)))
    >>> float(w), losses.tolist(), multipliers(state).tolist()
    (0.5, [1.0, 4.0], [0.0])
    """
    optimizer = as_transform("optimizer", optimizer)
    value_and_grad = scalarized_value_and_grad(loss, has_aux=has_aux, loss_scale=loss_scale, mode=mode)

    def step(params, state, batches, *args, levels=None, **extra_args):
        _chains.check_implicit(state)
        value, grads = value_and_grad(params, batches, multipliers(state), *args)
        value_fn = lambda new_params: retain_losses(loss, new_params, batches, *args, has_aux=has_aux, mode=mode)
        told = {"gradient_scale": loss_scale, "on_measured": lambda: _chains.check_surgery_is_last(state)}
        losses = value[0] if has_aux else value
        updates, new_state = optimizer.update(
            grads, state, params, losses=losses, levels=levels, value_fn=value_fn, **told, **extra_args
        )
        check_same_shapes("updates of the optimizer", updates, "params", params)
        return optax.apply_updates(params, updates), new_state, value

    return step
