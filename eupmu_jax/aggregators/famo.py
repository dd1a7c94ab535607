"""FAMO (Liu et al. 2023, arXiv 2306.03792, Algorithm 1): weights that make all log losses fall alike."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from eupmu_jax._stack.checks import check_number, check_numbers
from eupmu_jax.aggregators._weighting import count_of, from_losses
from eupmu_jax.gradients.value_and_grad import LOG_OFFSET


class FamoMemory(NamedTuple):
    """What `famo` keeps.

    Attributes:
      logits: `(K,)`; their softmax are the weights of the log losses.
      previous_losses: `(K,)` losses of the last step.
      optimizer_state: State of the logits' Adam.
    """

    logits: chex.Array
    previous_losses: chex.Array
    optimizer_state: Any


def famo(
    learning_rate: float = 0.025,
    weight_decay: float = 0.01,
    min_losses: "chex.Numeric" = 0.0,
    *,
    num_objectives: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Makes all losses fall at one relative rate, with weights learned from how much each of them fell.

    .. math::
      d = \sum_k \frac{z_k}{c D_k} g_k, \quad z = \operatorname{softmax}(\xi), \quad D_k = l_k - m_k + 10^{-8}, \quad
      c = \sum_k z_k / D_k

    .. math::
      \delta_k = \log D_k(\theta_{t-1}) - \log D_k(\theta_t), \qquad
      \xi \leftarrow \operatorname{Adam}\big(z \odot (\delta - \textstyle\sum_j z_j \delta_j) + \gamma \xi\big)

    The authors evaluate the losses of a batch again after the step. Here the losses of the next step, on its own batch,
    stand in for them: :math:`\xi` moves at the start of a step by the change in the losses since the last one. This
    costs no pass, is the same on one full batch, and otherwise adds the differences between batches to :math:`\delta`.

    Cost: one forward and one backward pass over all examples. d has weights that sum to 1, and a loss close to
    :math:`m_k` takes nearly all of them, even one that has reached it and whose gradient is 0. A step with a loss below
    `min_losses` is refused like one with NaN, so a forget loss without a lower bound needs another form. The authors
    clip the gradient to length 1: chain `optax.clip_by_global_norm(1.0)`.

    Args:
      learning_rate: Learning rate of Adam for the logits.
      weight_decay: gamma, added to Adam's gradient; the authors' value by default.
      min_losses: m, a number or `(K,)`.
      num_objectives: K, if it is not 2 and no array gives it; needed where the state must keep one shape.

    Returns:
      A transform with a `LossWeightingState` whose memory is a `FamoMemory`.

    Raises:
      ValueError: For a negative rate or decay, `min_losses` of another shape or not finite, or missing losses.

    >>> tx = famo()
    >>> tx.update(jnp.eye(2), tx.init(jnp.zeros(2)), losses=jnp.array([1.0, 3.0]))[0].round(5).tolist()
    [0.75, 0.25]
    """
    check_number("learning_rate", learning_rate, 0, finite=True)
    check_number("weight_decay", weight_decay, 0, finite=True)
    at_first = count_of(num_objectives, min_losses=min_losses)
    check_numbers("min_losses", min_losses, finite=True)
    optimizer = optax.chain(optax.add_decayed_weights(weight_decay), optax.adam(learning_rate))

    def start(k, dtype):
        logits = jnp.zeros(k, dtype)
        return FamoMemory(logits, jnp.zeros(k, dtype), optimizer.init(logits))

    def weigh(losses, state):
        if np.shape(min_losses) not in ((), losses.shape):
            raise ValueError(f"min_losses: got shape {np.shape(min_losses)}, expected a number or {losses.shape}")
        logits, previous, optimizer_state = state.memory
        above = lambda losses: losses - jnp.asarray(min_losses, losses.dtype) + LOG_OFFSET
        current, known = above(losses), state.count > 0
        # The logarithm of a ratio keeps the digits of a small change.
        change = jnp.log(jnp.where(known, above(previous) / current, 1))
        shares = jax.nn.softmax(logits)
        gradient = shares * (change - jnp.sum(shares * change))
        moved = optimizer.update(gradient, optimizer_state, logits)
        keep = lambda new, old: jnp.where(known, new, old).astype(old.dtype)
        update, optimizer_state = jax.tree.map(keep, moved, (jnp.zeros_like(logits), optimizer_state))
        logits = logits + update
        relative = jnp.where(jnp.all(current > 0), jax.nn.softmax(logits) / current, jnp.nan)
        return relative / relative.sum(), FamoMemory(logits, losses, optimizer_state)

    return from_losses(weigh, num_objectives, memory=start, at_first=at_first)
