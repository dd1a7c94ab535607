"""Looks into the states of other transforms."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax


def nodes(state: optax.OptState, is_kind: Callable[[Any], bool]) -> list:
    """The parts of a state that are of a kind, only the outermost ones.

    >>> state = (optax.ScaleByScheduleState(0), optax.MaskedState(optax.ScaleByScheduleState(1)))
    >>> [found.count for found in nodes(state, lambda node: isinstance(node, optax.ScaleByScheduleState))]
    [0, 1]
    """
    return [node for node in jax.tree.leaves(state, is_leaf=is_kind) if is_kind(node)]


def check_unmasked(params: chex.ArrayTree) -> None:
    """Raises `ValueError` for the parameters that a transform inside `optax.masked` gets, which no loss can take."""
    if nodes(params, lambda node: isinstance(node, optax.MaskedNode)):
        raise ValueError(
            "params: some leaves are masked, so this transform is inside optax.masked or optax.partition, where "
            "value_fn cannot be given the whole parameters; wrap the whole chain in eupmu_jax.freeze(chain, frozen) "
            "instead"
        )


def have_same_shapes(new: chex.ArrayTree, old: chex.ArrayTree) -> bool:
    """Whether two trees have leaves of the same shapes, in the same order.

    >>> have_same_shapes({"moment": jnp.ones(2)}, {"moment": jnp.zeros(2)})
    True
    """
    # Trees of shapes cannot be compared: nodes of a class without `__eq__`, such as a Flax module, are never equal.
    return [jnp.shape(leaf) for leaf in jax.tree.leaves(new)] == [jnp.shape(leaf) for leaf in jax.tree.leaves(old)]


def check_same_state(name: str, new: chex.ArrayTree, old: chex.ArrayTree, num_objectives: int) -> None:
    """Raises `ValueError` if an update changed the shape of a state, as happens if K is known only then."""
    if not have_same_shapes(new, old):
        raise ValueError(
            f"{name}: its state changes shape in an update; pass num_objectives={num_objectives} to its surgery"
        )
