"""EUPMU to the distribution of unseen data: each forgotten example is moved to a score that unseen data has."""

import functools

import chex
import jax
import jax.numpy as jnp
import optax

from eupmu_jax.gradients.batches import SharedForward, shared_forward
from eupmu_jax.methods._measured_end import (
    CHECKED,
    LEAST,
    MEASURED,
    WAYS,
    Target,
    figures,
    measured_end,
    passes_of_end,
)
from eupmu_jax.methods.eupmu_explicit import FAMILY, PAPER
from eupmu_jax.methods.eupmu_level import ALLOWED_ERROR, error_limit
from eupmu_jax.methods.method import Cost, LogUniform, Method, Procedure, keep_original
from eupmu_jax.objectives import transport
from eupmu_jax.surgery.default_optimizer import default_optimizer
from eupmu_jax.surgery.explicit import unilateral_surgery
from eupmu_jax.surgery.nonfinite import skip_nonfinite
from eupmu_jax.surgery.steps import explicit_step
from eupmu_jax.tasks import Task

# The last parameters and those between them and the original ones.
_POINTS = 1 + len(WAYS)


def eupmu_transport(task: Task, terms, settings) -> Procedure:
    r"""Surgery on the transport loss, with `default_optimizer` and a measured end.

    The forget loss is `objectives.transport` of the task's scores; the targets are quantiles of the scores that the
    original model has on held-out data (`objectives.transport_targets`), or, for a class to be forgotten entirely, of
    the scores that it gives to that class on examples of others. The chain is `unilateral_surgery` with tolerance 0 and
    a least multiplier `retain_weight`, then `default_optimizer` with `length`. No figure is steered during the run: as
    forgotten examples come to look like unseen ones the gradient of their loss vanishes, and the retain loss alone
    decides where the steps go; the schedule brings them to an end.

    The tolerance is kept to first order by the direction that the surgery hands over, not by the step of Muon, which is
    not proportional to it. The limit on the retain set is therefore enforced at the measured end, as for
    `eupmu_level`: the last parameters and three points between the original and the last ones are measured on a
    twelfth of each set, and the one chosen keeps the limit and is nearest to the error on unseen data. `allowed_error`,
    `limit` and `allowed_rise` are as there.

    Three constants, found on an MLP on 6,000 images of Fashion-MNIST and a small ResNet, with seeds that nothing else
    uses: the `length` 1 of the path (on the MLP half of it falls short, three times as much ends as near), the
    `retain_weight` 5 (on the MLP 1 to 10 end as near), and the weight of the upward side of the loss. A class to be
    forgotten entirely has further to go, and needs a longer path on some models, which its forget error shows.
    """
    limit = error_limit(terms.retain_error, settings)
    surgery = unilateral_surgery(0.0, retain_weight=settings["retain_weight"])
    descent = default_optimizer(None, terms.rounds or terms.steps, length=settings["length"])
    optimizer = skip_nonfinite(optax.chain(surgery, descent))
    take = explicit_step(_losses(task), optimizer)

    def step(params, prepared, state, batches, count, key):
        # Targets of the forget batch; the retain batch has none, and its head reads none.
        forget, retain = batches
        none = jnp.zeros(jax.tree.leaves(retain)[0].shape[0], jnp.float32)
        return take(params, state, ((forget, prepared[1]), (retain, none)), key)[:2]

    def finish(params, state, prepared, forget, retain):
        of_error = jnp.inf if limit is None else limit - terms.retain_error
        allowed = jnp.stack([of_error, settings.get("allowed_rise", jnp.inf)])
        begun = None if task.is_rate else terms.forget_error
        aim = Target(settings["target"], begun, terms.at_least)
        return measured_end(task, (forget, retain), terms.retain_batch, aim, allowed, prepared, params)

    cost = Cost((1, 1), (1, 1), outside_forward=passes_of_end(terms.num_forget, terms.num_retain, _POINTS))
    measured = functools.partial(figures, task), terms.retain_batch
    init = lambda params, prepared: optimizer.init(params)
    return Procedure(init, step, cost, keep_original, finish, (measured,))


def _losses(task: Task) -> SharedForward:
    """The transport loss and the retain loss, `(params, (batch, targets), key)`, sharing the task's forward pass."""
    assert task.score is not None  # required by the method
    score = task.score

    def forward(params: chex.ArrayTree, pair, key):
        return task.outputs(params, pair[0], key)

    heads = (
        lambda outputs, pair: transport(score(outputs, pair[0]), pair[1]),
        lambda outputs, pair: task.retain(outputs, pair[0]),
    )
    return shared_forward(forward, heads)


METHOD = Method(
    eupmu_transport,
    PAPER + ", to the distribution of unseen data",
    f"1F 1B forget and retain; before the first step 1F forget; after the last {_POINTS}F of a twelfth of each set, "
    f"{LEAST} to {MEASURED:,} examples, and 2F of more retained ones, up to {CHECKED} in all",
    "forget, retain and held-out sets",
    {
        "length": LogUniform(0.178, 5.62),
        "retain_weight": LogUniform(1.0, 25.0),
        "allowed_error": ALLOWED_ERROR,
    },
    requires=("score",),
    optional=("limit", "allowed_rise"),
    optimizer_settings=(),
    family=FAMILY,
    transports=True,
)
