"""Random labels: the forget set is relearned with wrong labels, alongside the retain set."""

from eupmu_jax.methods.method import LEARNING_RATE, MOMENTUM, LogUniform, Method, Procedure, complete
from eupmu_jax.methods.weighted_sum import weighted_sum


def random_labels(task, terms, settings) -> Procedure:
    """Linear scalarisation with the cross-entropy on random labels as its forget objective.

    Labels never equal the true ones and are drawn anew in every pass over the forget set, counted in whole steps: n
    examples in batches of b get new labels every ceil(n / b) steps, so if b does not divide n some keep theirs for two
    passes. Sets that are not in memory get new ones in every step. The larger a random forget set is, the more the
    wrong labels contradict what the retain set teaches.
    """
    return weighted_sum(task, terms, complete({**settings, "forget_objective": "random_labels"}))


METHOD = Method(
    random_labels,
    paper="Golatkar et al. 2020, arXiv 1911.04933",
    passes="1F 1B forget and retain",
    needs="forget and retain sets",
    space={"learning_rate": LEARNING_RATE, "retain_weight": LogUniform(0.3, 30.0), "momentum": MOMENTUM},
    forget=("random_labels",),
)
