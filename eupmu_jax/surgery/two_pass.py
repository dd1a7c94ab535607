"""Explicit surgery in the memory of one gradient: the multipliers from one pass, the bent gradient from another."""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from eupmu_jax import tolerances
from eupmu_jax._stack import algebra, checks, refusal
from eupmu_jax._stack.jaxpr import equations
from eupmu_jax.gradients.batches import Loss, Objectives
from eupmu_jax.gradients.value_and_grad import check_params, retain_losses, scalarized_value_and_grad
from eupmu_jax.surgery import explicit


class TwoPassState(NamedTuple):
    """State of `two_pass`: the surgery's, with the fields of `unilateral_surgery`, and the optimizer's.

    The forget gradient's squared norm in the Gram matrix is a difference, which is lost to rounding if the retain terms
    of the direction outweigh it a thousandfold.
    """

    surgery_state: explicit.UnilateralSurgeryState
    inner_state: optax.OptState


class TwoPass(NamedTuple):
    """A step and the function that makes its initial state.

    Attributes:
      init: `params -> TwoPassState`.
      step: `(params, state, batches, *args, levels=None) -> (params, state, losses)`, as `explicit_step`'s; other
        keywords, such as `value`, are passed to the optimizer.
    """

    init: Callable
    step: Callable


def two_pass(
    loss: Loss,
    inner: optax.GradientTransformation,
    tolerance: "chex.Numeric | optax.Schedule | tolerances.Tolerance" = 0.0,
    *,
    has_aux: bool = False,
    mode: str = "vmap",
    num_objectives: int | None = None,
    retain_weight: chex.Numeric = 0.0,
    shardings: chex.ArrayTree | None = None,
) -> TwoPass:
    r"""The step of `unilateral_surgery` followed by `inner`, without ever holding two gradients.

    .. math::
      \text{1.}\;\; g_k = \nabla l_k, \quad G_{kk} = \|g_k\|^2, \quad G_{jk} = \langle\nabla l_j, g_k\rangle\; (j < k)
      \qquad
      \text{2.}\;\; d = \nabla\Big(l_0 + \sum_k \lambda_k l_k\Big)

    Each retain gradient is formed, multiplied with the others and dropped: :math:`G_{jk}` is a forward-mode derivative
    of :math:`l_j` along :math:`g_k`, which needs no other gradient. The multipliers solve the same problem as those of
    `unilateral_surgery`, and the bent gradient comes from one backward pass of the scalarised loss. So at most one
    gradient is held in memory, where `explicit_step` holds K. This pays off on accelerators if parameters outweigh
    activations and the model's layers are scanned. The compiler can update unrolled layers one by one anyway, and XLA's
    CPU backend keeps the zeros that both scans start from, so a scanned model gains nothing there.

    Cost for K = 2: one more backward pass over the retain batch and one more forward-mode pass over the forget batch
    than a plain step, about 1.9 times its operations. K objectives take K-1 more backward passes and K(K-1)/2 more
    forward ones.

    A loss with a `jax.custom_vjp` inside (the convolution of `eupmu_jax.models`, a fused attention kernel) has no
    forward mode. Its inner products are taken with the reverse-mode gradient, leaf by leaf; the compiler then decides
    how much of the second gradient is in memory at once.

    A step with a loss or gradient that is not finite changes nothing but `nonfinite_count`, as with `skip_nonfinite`.

    Args:
      loss, has_aux: As in `scalarized_value_and_grad`; args of the step (a key, say) must give the same loss in every
        pass.
      inner: The optimizer after the surgery, such as `optax.adam(1e-4)`; it receives the bent gradient. All parameters
        take part in the surgery: frozen ones must be constants of `loss`, not masked here.
      mode: As in `scalarized_value_and_grad`, for the second pass. With batches of equal shapes `"vmap"` accumulates
        the sum; batches of different sizes have a gradient each before it.
      tolerance, num_objectives, retain_weight: As in `unilateral_surgery`.
      shardings: On a mesh, the parameters' `NamedSharding`s, which every gradient keeps too.

    Returns:
      `TwoPass(init, step)`.

    Raises:
      ValueError: As `unilateral_surgery` and `scalarized_value_and_grad`.

    >>> loss = lambda w, target: jnp.mean((w - target) ** 2)
    >>> init, step = two_pass(loss, optax.sgd(0.1))
    >>> w = jnp.array([0.5])
    >>> w, state, losses = step(w, init(w), (jnp.ones((4, 1)), jnp.zeros((9, 1))))  # forget pulls to 1, retain to 0
    >>> w.tolist(), state.surgery_state.multipliers.tolist()
    ([0.5], [1.0])
    """
    surgery = explicit.unilateral_surgery(tolerance, num_objectives=num_objectives, retain_weight=retain_weight)
    rule = tolerances.as_tolerance(tolerance)
    fixed = explicit.count_fixed(num_objectives, rule, retain_weight)
    inner = checks.as_transform("inner", inner)
    value_and_grad = scalarized_value_and_grad(loss, has_aux=has_aux, mode=mode)

    def place(gradient):
        return gradient if shardings is None else jax.lax.with_sharding_constraint(gradient, shardings)

    def step(params, state, batches, *args, levels=None, **extra_args):
        check_params(params)
        count = Objectives(loss, batches, args).count
        checks.check_count(count, fixed, "batches", at_most=explicit.MAX_OBJECTIVES)
        losses, gram = _losses_and_gram(loss, params, batches, args, has_aux, place)
        weights, finite, new = explicit.solve(rule, gram, state.surgery_state, losses, levels, retain_weight)
        multipliers = jnp.where(finite, weights[1:], 0)
        value, direction = value_and_grad(params, _after(batches, multipliers), multipliers, *args)
        direction = place(direction)
        squared_norm = algebra.squared_norm(direction)
        # Without matrix products, which accelerators may round to bfloat16.
        pull = jnp.sum(gram[1:, 1:] * weights[1:], axis=1)
        forget_squared_norm = squared_norm - jnp.sum(weights[1:] * (2 * gram[0, 1:] + pull))
        gram = gram.at[0, 0].set(jnp.maximum(forget_squared_norm, 0))
        finite &= jnp.isfinite(squared_norm)

        def value_fn(new_params):
            return retain_losses(loss, new_params, batches, *args, has_aux=has_aux, mode=mode)

        def take(params, inner_state):
            extra = {"losses": losses, "levels": levels, "value_fn": value_fn}
            updates, inner_state = inner.update(direction, inner_state, params, **extra, **extra_args)
            return optax.apply_updates(params, updates), inner_state

        # A branch: a select between old and new would hold a copy of the optimizer's state.
        params, inner_state = jax.lax.cond(finite, take, lambda *old: old, params, state.inner_state)
        old = explicit.fit(state.surgery_state, count)
        _, surgery_state = refusal.settle(finite, (), new._replace(gram=gram), old)
        return params, TwoPassState(surgery_state, inner_state), value

    return TwoPass(lambda params: TwoPassState(surgery.init(params), inner.init(params)), step)


def _losses_and_gram(loss, params, batches, args, has_aux, place):
    """Losses `(K,)` and Gram matrix `(K, K)`; the first entry is a lower bound, from components along retain rows."""
    k, dtype = Objectives(loss, batches, args).count, algebra.accumulator_dtype(params)
    gram, losses = jnp.zeros((k, k), dtype), [jnp.zeros([])] * k

    def scalar(j):
        # The batches wait for the last gradient's inner products, so that no gradient is formed before that one is
        # freed.
        objectives = Objectives(loss, _after(batches, gram), args, has_aux)
        return lambda params: objectives.evaluate(j, params)[0] if has_aux else objectives.evaluate(j, params)

    for i in range(1, k):
        losses[i], row = jax.value_and_grad(scalar(i))(params)
        row = place(row)
        gram = gram.at[i, i].set(algebra.squared_norm(row))
        for j in range(i):
            losses[j], product = _value_and_product(scalar(j), params, row)
            gram = gram.at[i, j].set(product.astype(dtype)).at[j, i].set(product.astype(dtype))
    norms = jnp.diagonal(gram)[1:]
    seen = jnp.max(jnp.where(norms > 0, gram[0, 1:] ** 2 / jnp.where(norms > 0, norms, 1), 0))
    return jnp.stack(losses), gram.at[0, 0].set(seen)


def _value_and_product(loss, params, row):
    """`(l, <grad l, row>)` by forward mode, or where the loss has none, by reverse mode."""
    if any(equation.primitive.name.startswith("custom_vjp") for equation, _ in equations(loss, params)):
        value, gradient = jax.value_and_grad(loss)(params)
        return value, algebra.inner_products(jax.tree.map(lambda leaf: leaf[None], gradient), row)[0]
    return jax.jvp(loss, (params,), (row,))


def _after(batches, numbers):
    """`batches`, available only once `numbers` are known."""
    return jax.lax.optimization_barrier((batches, numbers))[0]
