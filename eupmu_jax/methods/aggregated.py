"""Every aggregator of stacked gradients as a method: descent along its direction."""

import functools

import optax

from eupmu_jax import aggregators
from eupmu_jax.methods.eupmu_explicit import explicit_descent, stacked_descent
from eupmu_jax.methods.method import (
    FORGET_OBJECTIVE,
    LEARNING_RATE,
    MAX_NORM,
    MOMENTUM,
    Choice,
    Cost,
    LogUniform,
    Method,
)
from eupmu_jax.surgery.generalized_newton import scale_by_gen
from eupmu_jax.surgery.nonfinite import skip_nonfinite

_SPACE: dict[str, LogUniform | Choice] = {"learning_rate": LEARNING_RATE, "forget_objective": FORGET_OBJECTIVE}
_PASSES, _NEEDS = "1F 1B forget and retain, stacked", "forget and retain sets"
FAMILY = "aggregators"


def aggregated(aggregator, paper: str, **own) -> Method:
    """The method of an aggregator.

    Args:
      aggregator: Factory of a stacked transform.
      paper: See `Method`.
      **own: Its own setting, a keyword of the factory, and its range; momentum is searched if there is none.
    """

    def make(task, terms, settings):
        return stacked_descent(task, terms, settings, aggregator(**{name: settings[name] for name in own}))

    return Method(make, paper, _PASSES, _NEEDS, _SPACE | (own or {"momentum": MOMENTUM}), family=FAMILY)


GEN_EVERY = 10


def ngdiff(task, terms, settings):
    """NGDiff with its automatic learning rate: GeN starts from `learning_rate` and follows the retain loss.

    The optimizer is SGD: Adam would discard the unit norms.
    """
    optimizer = optax.chain(
        aggregators.ngdiff(),
        optax.clip_by_global_norm(MAX_NORM),
        optax.sgd(1.0, settings["momentum"]),
        scale_by_gen(settings["learning_rate"], GEN_EVERY),
        optax.scale_by_schedule(optax.linear_schedule(1.0, 0.0, terms.steps)),
    )
    descent = explicit_descent(task, settings, skip_nonfinite(optimizer))
    measurements = -(-terms.steps // GEN_EVERY)
    return descent._replace(cost=Cost((1, 1 + 3 * measurements / terms.steps), (1, 1)))


METHODS = {
    "mean": aggregated(aggregators.mean, "linear scalarisation"),
    "PCGrad": aggregated(aggregators.pcgrad, "Yu et al. 2020, arXiv 2001.06782"),
    "CAGrad": aggregated(aggregators.cagrad, "Liu et al. 2021, arXiv 2110.14048", c=LogUniform(0.1, 0.9)),
    "MGDA": aggregated(aggregators.mgda, "Sener and Koltun 2018, arXiv 1810.04650"),
    "IMTL-G": aggregated(aggregators.imtl_g, "Liu et al., ICLR 2021"),
    "Nash-MTL": aggregated(aggregators.nash_mtl, "Navon et al. 2022, arXiv 2202.01017"),
    "UPGrad": aggregated(aggregators.upgrad, "Quinton and Rey 2024, arXiv 2406.16232"),
    "DualProj": aggregated(aggregators.dualproj, "Lopez-Paz and Ranzato 2017, arXiv 1706.08840"),
    "aligned-MTL": aggregated(aggregators.aligned_mtl, "Senushkin et al. 2023, arXiv 2305.19000"),
    "ConFIG": aggregated(aggregators.config, "Liu et al. 2024, arXiv 2408.11104"),
    "FAMO": aggregated(
        lambda weight_learning_rate: aggregators.famo(weight_learning_rate),
        "Liu et al. 2023, arXiv 2306.03792",
        weight_learning_rate=LogUniform(0.002, 0.2),
    ),
    "NGDiff": Method(
        ngdiff,
        "Bu et al. 2024, arXiv 2410.22086, with GeN, arXiv 2407.02772",
        f"1F 1B forget and retain, stacked, 3F retain every {GEN_EVERY} steps",
        _NEEDS,
        _SPACE | {"learning_rate": LogUniform(0.03, 1.0), "momentum": MOMENTUM},
        optimizer_settings=("momentum",),
        family=FAMILY,
    ),
    "GDR-GMA": aggregated(aggregators.gdr_gma, "Lin et al., ACM MM 2024", epsilon=LogUniform(0.005, 0.5)),
    "GDR-GMA, clean": aggregated(
        functools.partial(aggregators.gdr_gma, projection="clean"),
        "Lin et al., ACM MM 2024, both projections of the original gradients",
        epsilon=LogUniform(0.005, 0.5),
    ),
    "Chebyshev": aggregated(aggregators.chebyshev, "Chebyshev scalarisation, Bowman 1976", rho=LogUniform(1e-4, 1.0)),
    "OMD-TCH": aggregated(aggregators.omd_tch, "Liu et al. 2024, arXiv 2410.21764", eta=LogUniform(0.001, 0.1)),
    "OWA": aggregated(aggregators.owa, "Yager 1988"),
}
