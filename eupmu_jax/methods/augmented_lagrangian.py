"""The augmented Lagrangian on the level of the retain loss."""

from eupmu_jax import controllers, tolerances
from eupmu_jax.methods.eupmu_implicit import implicit_descent
from eupmu_jax.methods.method import FORGET_OBJECTIVE, LEARNING_RATE, LogUniform, Method, Procedure
from eupmu_jax.surgery.implicit import implicit_surgery

# The budget of a run that sets none, in nats.
DEFAULT_RISE = 0.02
PENALTY = LogUniform(1.0, 1000.0)
# The multiplier at the start of a run: the plain sum of both losses.
FIRST_MULTIPLIER = 1.0


def augmented_lagrangian(task, terms, settings) -> Procedure:
    r"""Descent on :math:`l_f` subject to :math:`e = l_r(\theta) - l_r(\theta_0) - B \le 0`, B = `allowed_rise` nats.

    .. math::
      g_t = \nabla(l_f + \lambda_t l_r), \qquad \mu_{t+1} = \max(0, \mu_t + \eta e_t), \qquad
      \lambda_{t+1} = \max(0, \mu_{t+1} + \rho e_t)

    with :math:`\rho` = `penalty`, :math:`\eta = \rho / 10` and e measured on the step's retain batch; see
    `controllers.augmented_lagrangian`. In the classical method :math:`\eta = \rho`, which oscillates if mu moves in
    every gradient step. B is 0.02 by default: it is the user's constraint, not a tuning parameter.

    Failure cases: e is as noisy as a minibatch's loss, and lambda is rho times as noisy. With a small penalty the run
    ends before mu has found its level. Nothing measures the end, unlike in `eupmu_budget`.

    Primal-dual unlearning, PDU (Entesari et al. 2025, arXiv 2506.05314), has only the update of mu, also on the step's
    batch: :math:`\lambda_{t+1} = \max(0, \lambda_t + \eta e_t)`, that of `controllers.nu_pi` with `proportional=0`,
    which rho e damps here. It bounds the retain loss itself, not its rise, and in a published run lambda stays at 100
    for five epochs before it moves; here it begins at 1 and moves at once. Its forget loss, the squared distance of the
    largest logit from the mean one, is not in `tasks.language`, whose `kl_to_uniform` has the same aim.

    Source: Hestenes 1969; Powell 1969; Rockafellar 1973.
    """
    rho = settings["penalty"]
    return level_descent(task, terms, settings, controllers.augmented_lagrangian(rho, 0.1 * rho))


def level_descent(task, terms, settings, controller) -> Procedure:
    """Descent on the weighted sum; `controller` steers the multiplier by the distance of the retain loss to B."""
    limit = terms.retain_loss + settings.get("allowed_rise", DEFAULT_RISE)
    surgery = implicit_surgery(
        tolerances.budget(limit, 1.0), controller, proxy="level", initial_multiplier=FIRST_MULTIPLIER
    )
    return implicit_descent(task, terms, settings, surgery, (1, 1))


METHOD = Method(
    augmented_lagrangian,
    paper="Hestenes 1969, Powell 1969",
    passes="1F 1B forget and retain",
    needs="forget and retain sets",
    space={"learning_rate": LEARNING_RATE, "forget_objective": FORGET_OBJECTIVE, "penalty": PENALTY},
    optional=("allowed_rise",),
)
