"""Checks that an optimizer fits the step it is passed to, as far as its state and its updates show."""

import collections
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from eupmu_jax._stack.checks import check_same_shapes, describe
from eupmu_jax._stack.states import nodes
from eupmu_jax.surgery.generalized_newton import ScaleByGenState
from eupmu_jax.surgery.implicit import ImplicitSurgeryState


def check_explicit(state: optax.OptState) -> None:
    """Raises `ValueError` if the optimizer of this state cannot take stacked gradients."""
    if any(_stacked(node.inner_opt_state) for node in _nodes(state, optax.MultiStepsState)):
        raise ValueError(
            "optimizer: got a stacked transform inside optax.MultiSteps, which cannot sum stacked gradients; use "
            "eupmu_jax.accumulate(chain, n)"
        )
    if any(_stacked(node.inner_state) for node in _nodes(state, optax.ApplyIfFiniteState)):
        raise ValueError(
            "optimizer: got a stacked transform inside optax.apply_if_finite, which cannot collapse a stack; use "
            "eupmu_jax.skip_nonfinite(chain)"
        )
    conditional = optax.ConditionallyTransformState, optax.ConditionallyMaskState
    if any(_stacked(node.inner_state) for node in _nodes(state, conditional)):
        raise ValueError(
            "optimizer: got a stacked transform inside optax.conditionally_transform or conditionally_mask, which "
            "cannot collapse a stack in one case and leave it in the other; wrap only what follows the surgery in them"
        )
    if _nodes(state, ImplicitSurgeryState) and not _stacked(state):
        raise ValueError(
            "optimizer: got a chain with implicit_surgery, which takes one gradient: call implicit_step; explicit_step "
            "is for a chain that begins with a stacked transform such as unilateral_surgery"
        )


def check_collapsed(updates: chex.ArrayTree, params: chex.ArrayTree, new_state: Any, state: Any) -> None:
    """Raises `ValueError` if the optimizer leaves an objective axis in its updates or in its state."""
    check_same_shapes(
        "updates of the optimizer",
        updates,
        "params",
        params,
        ": explicit_step hands the optimizer stacked gradients, (K, *param.shape), so it must begin with a transform "
        "that collapses the stack: optax.chain(eupmu_jax.unilateral_surgery(), optimizer)",
    )
    structures: list[Any] = [jax.tree.structure(new_state), jax.tree.structure(state)]
    if structures[0] != structures[1]:
        return
    old = jax.tree_util.tree_leaves_with_path(state)
    for (path, before), after in zip(old, jax.tree.leaves(new_state), strict=True):
        if jnp.ndim(after) > jnp.ndim(before) and jnp.shape(after)[1:] == jnp.shape(before):
            raise ValueError(
                f"optimizer: {describe(path)} in its state grew from shape {jnp.shape(before)} to {jnp.shape(after)}, "
                "so it saw stacked gradients; put the transform that collapses the stack first in the chain"
            )


def check_implicit(state: optax.OptState) -> None:
    """Raises `ValueError` if the optimizer of this state takes stacked gradients."""
    if _stacked(state) and not _nodes(state, ImplicitSurgeryState):
        raise ValueError(
            "optimizer: got a chain that takes stacked gradients: call explicit_step; implicit_step is for a chain "
            "that ends with implicit_surgery or reference_surgery"
        )
    if any(_nodes(node.inner_opt_state, ImplicitSurgeryState) for node in _nodes(state, optax.MultiStepsState)):
        raise ValueError(
            "optimizer: got optax.MultiSteps around implicit_surgery, to which it does not pass the losses; wrap only "
            "the optimizer before the surgery in it, and divide the tolerance by its number of steps, since the "
            "multiplier moves in each of them"
        )


def check_surgery_is_last(state: optax.OptState) -> None:
    """Raises `ValueError` if anything follows the implicit surgery in a chain with this state."""
    members = list(state.values()) if isinstance(state, dict) else list(state) if isinstance(state, tuple) else []
    # The states of optax.chain and optax.named_chain, in order.
    if type(state) in (tuple, collections.OrderedDict):
        holding = [i for i, member in enumerate(members) if _nodes(member, ImplicitSurgeryState)]
        if holding and holding[-1] < len(members) - 1:
            raise ValueError(
                "optimizer: something follows implicit_surgery in the chain, but with proxy='same_batch' the surgery "
                "measures the retain loss at params + updates, so its updates must be the final ones; put it last: "
                "optax.chain(optax.sgd(0.1), implicit_surgery(...))"
            )
    for member in members:
        check_surgery_is_last(member)


def _nodes(state, kind):
    return nodes(state, lambda node: isinstance(node, kind))


def _stacked(state):
    """Whether the state belongs to a transform of stacked gradients."""
    counts = lambda node: hasattr(node, "nonfinite_count") or hasattr(node, "refused_microbatches")
    return any(not isinstance(node, ImplicitSurgeryState | ScaleByGenState) for node in nodes(state, counts))
