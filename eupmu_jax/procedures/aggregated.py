"""Every aggregator of stacked gradients as a method: SGD on its direction."""

from eupmu_jax import aggregators
from eupmu_jax.procedures.eupmu_explicit import stacked_descent
from eupmu_jax.procedures.procedure import FORGET_OBJECTIVE, LEARNING_RATE, MOMENTUM, Method

_SPACE = {"learning_rate": LEARNING_RATE, "forget_objective": FORGET_OBJECTIVE}


def aggregated(aggregator, paper: str, passes: str = "1F 1B forget and retain, stacked", **own) -> Method:
    """The method of an aggregator.

    Args:
      aggregator: Factory of a stacked transform.
      paper, passes: See `Method`.
      **own: Its own setting and where it is searched, a keyword of the factory; momentum is searched if there is none.
    """

    def make(problem, settings):
        return stacked_descent(problem, settings, aggregator(**{name: settings[name] for name in own}))

    return Method(make, paper, passes, "forget and retain set", _SPACE | (own or {"momentum": MOMENTUM}))


METHODS = {
    "mean": aggregated(aggregators.mean, "linear scalarisation"),
    "UPGrad": aggregated(aggregators.upgrad, "Quinton and Rey 2024, arXiv 2406.16232"),
    "DualProj": aggregated(aggregators.dualproj, "Lopez-Paz and Ranzato 2017, arXiv 1706.08840"),
    "OWA": aggregated(aggregators.owa, "Yager 1988"),
}
