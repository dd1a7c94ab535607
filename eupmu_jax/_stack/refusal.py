"""Refused steps: one with a value that is not finite changes nothing but the count of such steps."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from eupmu_jax._stack.algebra import all_finite


def counters() -> tuple[chex.Array, chex.Array]:
    """`count` and `nonfinite_count` at the start."""
    return jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32)


def choose(taken: chex.Array, new: chex.ArrayTree, old: chex.ArrayTree) -> chex.ArrayTree:
    """`new` if the step is taken, else `old`, in the dtypes of `old`.

    >>> choose(jnp.array(False), {"moment": jnp.nan}, {"moment": jnp.ones(())})["moment"].tolist()
    1.0
    """

    def choose_leaf(new, old):
        chosen, dtype = jnp.where(taken, new, old), jnp.asarray(old).dtype
        # Random keys, as in the state of optax.add_noise, have a dtype that nothing can be cast to.
        return chosen if chosen.dtype == dtype else chosen.astype(dtype)

    return jax.tree.map(choose_leaf, new, old)


def zero_unless(taken: chex.Array, updates: chex.ArrayTree) -> chex.ArrayTree:
    """The updates if the step is taken, else zeros."""
    return jax.tree.map(lambda leaf: jnp.where(taken, leaf, jnp.zeros_like(leaf)), updates)


def settle(finite: chex.Array, updates: chex.ArrayTree, new: Any, old: Any) -> tuple[chex.ArrayTree, Any]:
    """The outcome of a step: its updates and the `new` state, or, if it is refused, zeros and the `old` one.

    Args:
      finite: Whether the step is taken.
      updates: Of the parameters' shapes.
      new, old: States with the fields `count` and `nonfinite_count`; those of `new` are not read.

    A step is refused too if its updates overflow in float16, whose range is narrower than that of the sums before.
    """
    if narrow := [leaf for leaf in jax.tree.leaves(updates) if leaf.dtype == jnp.float16]:
        finite &= all_finite(narrow)
    return zero_unless(finite, updates), choose(finite, new, old)._replace(
        count=jnp.where(finite, optax.safe_increment(old.count), old.count),
        nonfinite_count=jnp.where(finite, old.nonfinite_count, optax.safe_increment(old.nonfinite_count)),
    )
