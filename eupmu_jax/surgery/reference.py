"""The multiplier update of the released EUPMU code, for parity with published runs only."""

import chex
import jax.numpy as jnp
import optax

from eupmu_jax._stack.checks import check_numbers
from eupmu_jax.surgery.implicit import multiplier_transform
from eupmu_jax.tolerances import stateless


def reference_surgery(
    error: chex.Numeric = 0.01,
    multiplier_learning_rate: float = 1.0,
    weight_decay: float = 0.01,
    initial_multiplier: chex.Numeric = 0.0,
    *,
    num_objectives: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The released code's exact behaviour (anseryuer/EUPMU, class `EU` of `weight_methods.py`), defaults included.

    .. math::
      \delta_t = \log(l_r(\theta_t) + 10^{-8}) - \log(l_r(\theta_{t+1}) + 10^{-8}) - \text{error}, \qquad
      w_{t+1} = w_t + \text{Adam}(\delta_t + \text{weight\_decay} \cdot w_t)

    It differs from the paper, and from `implicit_surgery`, in four ways: `error` demands that the retain loss *falls*,
    where the paper's tolerance lets it rise (epsilon = -error * l_r / alpha); the learning rate does not appear; Adam
    with coupled decay, whose fixed point is `(error - E[log improvement]) / weight_decay`, drives the multiplier; and
    the multiplier is not projected, so it winds up below 0. Use it with `scalarized_value_and_grad(loss,
    loss_scale="log")`, which counts a negative multiplier as 0, as the code does.

    Args:
      error: Decrease of the log retain loss that is demanded in each step.
      multiplier_learning_rate: Adam's.
      weight_decay: Added to Adam's gradient (L2), not decoupled.
      initial_multiplier: A float or `(K-1,)`.
      num_objectives: K, if not 2.

    Returns:
      A transform like `implicit_surgery` with `proxy="same_batch"`: last in the chain, and `update` needs `params`,
      `losses` and `value_fn`.

    Raises:
      ValueError: For a setting that is not finite, a negative rate or decay, or values of the wrong length.

    >>> tx = reference_surgery(error=0.01)
    >>> w = jnp.array(1.0)
    >>> _, state = tx.update(jnp.array(0.0), tx.init(w), w, losses=jnp.ones(2), value_fn=lambda w: w)
    >>> state.multipliers.round(3).tolist()  # Adam's first step is its learning rate, whatever the error
    [1.0]
    """
    count = check_numbers("error", error, finite=True)
    check_numbers("multiplier_learning_rate", multiplier_learning_rate, 0, finite=True)
    check_numbers("weight_decay", weight_decay, 0, finite=True)
    check_numbers("initial_multiplier", initial_multiplier, finite=True)
    return multiplier_transform(
        stateless(lambda *_: -jnp.asarray(error), count),
        optax.chain(optax.add_decayed_weights(weight_decay), optax.adam(multiplier_learning_rate)),
        loss_scale="log",
        proxy="same_batch",
        learning_rate=None,
        initial_multiplier=initial_multiplier,
        num_objectives=num_objectives,
        project=lambda multipliers: multipliers,
    )
