"""What losses of logits share."""

import chex
import jax
import jax.numpy as jnp


def promoted(values: chex.Array) -> chex.Array:
    """The values in float32 at least."""
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))


def kl_of_logits(reference: chex.Array, logits: chex.Array) -> chex.Array:
    """KL(softmax(reference) || softmax(logits)) over the last axis; 0 log 0 is 0, where a reference is minus infinity.

    >>> round(float(kl_of_logits(jnp.array([0.0, -jnp.inf]), jnp.zeros(2))), 4)
    0.6931
    """
    given = jax.nn.log_softmax(reference)
    log_ratios = jnp.where(jnp.isneginf(given), 0, given - jax.nn.log_softmax(logits))
    return jnp.sum(jnp.exp(given) * log_ratios, axis=-1)
