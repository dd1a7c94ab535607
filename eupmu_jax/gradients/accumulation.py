"""Accumulation of stacked gradients over microbatches."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from eupmu_jax._stack import algebra, checks, refusal
from eupmu_jax._stack.states import check_same_state, have_same_shapes


class AccumulateState(NamedTuple):
    """State of `accumulate`.

    Attributes:
      mini_step: Microbatches in the sum so far.
      gradient_sum: Stacked sum, `(K, *param.shape)` in every leaf, float32 (float64 for float64 parameters).
      loss_sum: `(K,)`.
      refused_microbatches: Microbatches left out because a gradient, loss or error was not finite.
      inner_state: State of the wrapped chain.
      error_sum: `(K,)`.
    """

    mini_step: chex.Array
    gradient_sum: chex.ArrayTree
    loss_sum: chex.Array
    refused_microbatches: chex.Array
    inner_state: optax.OptState
    error_sum: chex.Array


def accumulate(
    inner: optax.GradientTransformation, every_k_steps: int, *, num_objectives: int = 2
) -> optax.GradientTransformationExtraArgs:
    r"""Averages stacked gradients over microbatches and performs surgery once, on the averages.

    Surgery is not linear: the sum of bent gradients is not the bent sum. So the stack is accumulated,
    :math:`\bar g_k = \frac1n\sum_i g_k^{(i)}`, and `inner`, which begins with the surgery, sees the mean every
    `every_k_steps` microbatches; in between, the updates are 0. `optax.MultiSteps` cannot do this: it expects updates
    of the same shape before and after.

    A microbatch with a non-finite loss, error or gradient is left out of the sum and counted, and another one takes its
    place.

    To leave optimizer moments untouched by a refused step, wrap inside: `accumulate(skip_nonfinite(chain), n)`.

    Args:
      inner: A chain that begins with a stacked transform.
      every_k_steps: n, at least 1.
      num_objectives: K.

    Returns:
      A transform whose `update` optionally takes `losses` and `errors` `(K,)`, each on every microbatch or on none. It
      passes their means and all other extra arguments (of the last microbatch) to `inner`.

    Raises:
      ValueError: For `every_k_steps` < 1, or updates with another number of objectives.

    >>> from eupmu_jax.surgery.explicit import unilateral_surgery
    >>> tx = accumulate(optax.chain(unilateral_surgery(), optax.sgd(1.0)), every_k_steps=2)
    >>> params, state = jnp.zeros(1), tx.init(jnp.zeros(1))
    >>> first, state = tx.update(jnp.array([[1.0], [0.0]]), state, params)
    >>> second, state = tx.update(jnp.array([[3.0], [0.0]]), state, params)
    >>> first.tolist(), second.tolist()
    ([0.0], [-2.0])
    """
    checks.check_int("every_k_steps", every_k_steps, 1)
    checks.resolve_num_objectives(num_objectives)
    inner = checks.as_transform("inner", inner)

    def init_fn(params):
        def zeros(param):
            zero = jnp.zeros_like(
                param, jnp.promote_types(jnp.result_type(param), jnp.float32)
            )  # Sharded like the parameter.
            return jnp.broadcast_to(zero, (num_objectives, *jnp.shape(param)))

        return AccumulateState(
            mini_step=jnp.zeros([], jnp.int32),
            gradient_sum=jax.tree.map(zeros, params),
            loss_sum=jnp.zeros(num_objectives, algebra.accumulator_dtype(params)),
            refused_microbatches=jnp.zeros([], jnp.int32),
            inner_state=inner.init(params),
            error_sum=jnp.zeros(num_objectives, algebra.accumulator_dtype(params)),
        )

    def update_fn(updates, state, params=None, *, losses=None, errors=None, **extra_args):
        k = checks.count_objectives(updates, params, num_objectives)
        losses, errors = checks.check_losses(losses, k), None if errors is None else checks.check_errors(errors, k)
        given = {"losses": losses, "errors": errors}
        given = {name: values for name, values in given.items() if values is not None}
        finite = algebra.all_finite((updates, given))
        totals = {"losses": state.loss_sum, "errors": state.error_sum}
        old_sums = (state.gradient_sum, {name: totals[name] for name in given})
        sums = jax.tree.map(lambda total, new: total + new.astype(total.dtype), old_sums, (updates, given))
        gradient_sum, sums = refusal.choose(finite, sums, old_sums)
        totals |= sums
        mini_step = state.mini_step + finite.astype(state.mini_step.dtype)

        def apply(inner_state):
            means = jax.tree.map(lambda total, new: (total / mini_step).astype(new.dtype), gradient_sum, updates)
            averages = {name: totals[name] / mini_step for name in given}
            new_updates, new_state = inner.update(means, inner_state, params, **averages, **extra_args)
            # Some optimizers widen narrow dtypes, but both branches must return the same ones.
            like = updates if params is None else params
            new_updates = jax.tree.map(lambda new, old: new.astype(jnp.result_type(old)), new_updates, like)
            if have_same_shapes(new_state, inner_state):
                new_state = refusal.choose(jnp.array(True), new_state, inner_state)
            inner_state = new_state
            empty = jax.tree.map(jnp.zeros_like, state._replace(inner_state=None))
            return new_updates, empty._replace(refused_microbatches=state.refused_microbatches, inner_state=inner_state)

        def wait(inner_state):
            like = updates if params is None else params
            strip = (lambda leaf: jnp.zeros(leaf.shape[1:], leaf.dtype)) if params is None else jnp.zeros_like
            count = state.refused_microbatches
            refused = jnp.where(finite, count, optax.safe_increment(count))
            return jax.tree.map(strip, like), AccumulateState(
                mini_step, gradient_sum, totals["losses"], refused, inner_state, totals["errors"]
            )

        was, becomes = state.inner_state, jax.eval_shape(apply, state.inner_state)[1].inner_state
        check_same_state("inner", becomes, was, num_objectives)
        return jax.lax.cond(mini_step >= every_k_steps, apply, wait, state.inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
