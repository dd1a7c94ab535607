"""Objectives for classifiers: functions of logits `(..., C)` and int labels `(...)`; means over examples, minimised.

All compute in float32 at least, whatever the dtype of the logits, and raise `ValueError` for shapes that do not match.
Labels are from 0 to C - 1. They are not checked: -1 is taken for the last class, not for an example to be ignored.
"""

import chex
import jax
import jax.numpy as jnp
import optax

from eupmu_jax.objectives._logits import kl_of_logits, promoted


def cross_entropy(logits: chex.Array, labels: chex.Array) -> jax.Array:
    """Mean of -log p(label): the retain loss, and the forget loss of relabelling with `random_labels`.

    >>> round(float(cross_entropy(jnp.zeros((4, 10)), jnp.arange(4))), 4)
    2.3026
    """
    return jnp.mean(_cross_entropies(logits, labels))


def gradient_ascent(logits: chex.Array, labels: chex.Array) -> jax.Array:
    """Mean of log p(label), which has no lower bound. Negative, so not for log scale.

    >>> round(float(gradient_ascent(jnp.zeros((4, 10)), jnp.arange(4))), 4)
    -2.3026
    """
    return -cross_entropy(logits, labels)


def bounded_ascent(logits: chex.Array, labels: chex.Array, bound: float | None = None) -> jax.Array:
    """Ascent that leaves an example alone once it is forgotten: mean of bound - min(-log p(label), bound).

    Lies in [0, bound]; 0 when every example's cross-entropy has reached `bound`, by default ln C, that of a uniform
    guess. The constant makes it usable in log scale until it is exactly 0; gradients are those of bounded ascent.

    >>> round(float(bounded_ascent(jnp.array([[10.0, 0.0], [-10.0, 0.0]]), jnp.array([0, 0]))), 4)
    0.3466
    """
    limit = jnp.log(logits.shape[-1]) if bound is None else bound
    return jnp.mean(jnp.maximum(limit - _cross_entropies(logits, labels), 0))


def random_labels(key: chex.PRNGKey, labels: chex.Array, num_classes: int) -> jax.Array:
    """Labels drawn uniformly from the classes other than the true one. Redraw each epoch with a new key.

    Args:
      key: Fold the epoch into it: `jax.random.fold_in(key, epoch)`.
      labels: True labels, ints in [0, num_classes), of any shape.
      num_classes: At least 2.

    Returns:
      Array like `labels`, nowhere equal to it.

    Raises:
      ValueError: For fewer than two classes.

    >>> bool(jnp.any(random_labels(jax.random.key(0), jnp.arange(10), 10) == jnp.arange(10)))
    False
    """
    if num_classes < 2:
        raise ValueError(f"num_classes: got {num_classes}, expected at least 2: a wrong label must exist")
    labels = jnp.asarray(labels)
    # A draw from one class fewer, moved past the true one: no sum could overflow a small integer type.
    drawn = jax.random.randint(key, labels.shape, 0, num_classes - 1, dtype=labels.dtype)
    return drawn + (drawn >= labels).astype(labels.dtype)


def kl_to_teacher(logits: chex.Array, teacher_logits: chex.Array, temperature: float = 1.0) -> jax.Array:
    """T^2 times the mean of KL(softmax(teacher / T) || softmax(logits / T)), summed over classes. The teacher is fixed.

    Where the teacher's logit is minus infinity, as for a class that is masked out, the term is 0.

    >>> float(kl_to_teacher(jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 2.0]])))
    0.0
    """
    if teacher_logits.shape != logits.shape:
        raise ValueError(f"teacher_logits: got shape {teacher_logits.shape}, expected that of logits, {logits.shape}")
    teacher = jax.lax.stop_gradient(promoted(teacher_logits)) / temperature
    return temperature**2 * jnp.mean(kl_of_logits(teacher, promoted(logits) / temperature))


def kl_to_uniform(logits: chex.Array) -> jax.Array:
    """Mean of KL(uniform || softmax(logits)): 0 for a model that has no preference.

    Uniform over the possible classes, without any that is masked out by a logit of minus infinity.

    >>> float(kl_to_uniform(jnp.ones((3, 10))))
    0.0
    """
    return kl_to_teacher(logits, jnp.where(jnp.isneginf(logits), logits, 0))


def _cross_entropies(logits, labels):
    if jnp.shape(labels) != logits.shape[:-1]:
        raise ValueError(f"labels: got shape {jnp.shape(labels)}, expected {logits.shape[:-1]}, a class for each row")
    return optax.softmax_cross_entropy_with_integer_labels(promoted(logits), labels)
