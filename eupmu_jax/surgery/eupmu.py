"""The whole EUPMU optimizer in one line."""

import optax

from eupmu_jax._stack.checks import check_number, check_numbers
from eupmu_jax.surgery.implicit import implicit_surgery
from eupmu_jax.surgery.nonfinite import skip_nonfinite


def eupmu(
    learning_rate: "float | optax.Schedule",
    tolerance: float = 0.0,
    multiplier_learning_rate: float = 1.0,
    *,
    momentum: float | None = None,
    max_norm: float | None = None,
    proxy: str = "same_batch",
    initial_multiplier: float = 0.0,
    num_objectives: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""EUPMU as the paper states it: SGD on l_f + lambda * l_r, and a multiplier that follows the retain loss.

    .. math::
      \theta_{t+1} = \theta_t - \alpha_t \nabla(l_f + \lambda_t l_r)(\theta_t), \qquad
      \lambda_{t+1} = \max\Big(0, \lambda_t - \beta \Big(\frac{l_r(\theta_t) - l_r(\theta_{t+1})}{\alpha_t} +
      \epsilon\Big)\Big)

    A step with a loss or gradient that is not finite changes nothing and is counted. Use `implicit_step` to take the
    step. For another base optimizer, chain it with `implicit_surgery` yourself.

    A converged model does not survive large steps: its retain gradient is small, so the multiplier takes many steps to
    give it enough weight. Begin with `learning_rate=0.01, multiplier_learning_rate=0.1, max_norm=1.0,
    initial_multiplier=1.5` and a forget loss that is bounded (`objectives.bounded_ascent`), and measure the final
    parameters (`furthest_feasible`): nothing here bounds the retain loss over a whole run. `tolerances.budget` does.

    Args:
      learning_rate: alpha, a float or a schedule.
      tolerance: epsilon, see `implicit_surgery`.
      multiplier_learning_rate: beta.
      momentum: As in `optax.sgd`.
      max_norm: Clips the scalarised gradient to this global norm; None clips nothing.
      proxy, initial_multiplier, num_objectives: As in `implicit_surgery`.

    Returns:
      A transform whose `update` needs `params`, `losses` and, for `same_batch`, `value_fn`.

    Raises:
      ValueError: For a negative, infinite or missing learning rate, a momentum outside [0, 1), a `max_norm` that is not
        positive, and as `implicit_surgery`.

    >>> import jax.numpy as jnp
    >>> from eupmu_jax.surgery.steps import implicit_step
    >>> loss = lambda w, target: jnp.mean((w - target) ** 2)
    >>> tx = eupmu(learning_rate=0.1)
    >>> w, state, losses = implicit_step(loss, tx)(jnp.array(0.0), tx.init(jnp.array(0.0)), (jnp.ones(1), -jnp.ones(9)))
    >>> losses.tolist(), w.round(3).tolist()
    ([1.0, 1.0], 0.2...)
    """
    if not callable(learning_rate):
        check_number("learning_rate", learning_rate, 0, finite=True, why=", or a schedule")
    check_numbers("multiplier_learning_rate", multiplier_learning_rate, 0, finite=True)
    if momentum is not None:
        check_number("momentum", momentum, 0, below=1)
    if max_norm is not None:
        check_number("max_norm", max_norm, above=0)
    surgery = implicit_surgery(
        tolerance,
        optax.sgd(multiplier_learning_rate),
        proxy=proxy,
        learning_rate=learning_rate,
        initial_multiplier=initial_multiplier,
        num_objectives=num_objectives,
    )
    clip = optax.identity() if max_norm is None else optax.clip_by_global_norm(max_norm)
    return skip_nonfinite(optax.chain(clip, optax.sgd(learning_rate, momentum), surgery))
