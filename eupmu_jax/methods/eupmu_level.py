"""EUPMU to the level of unseen data: how far to forget is measured, not tuned."""

import functools

import chex
import jax
import jax.numpy as jnp
import optax

from eupmu_jax.controllers import forget_level, retain_limit, scale_by_limit
from eupmu_jax.gradients.batches import SharedForward, shared_forward
from eupmu_jax.methods._measured_end import (
    CHECKED,
    LEAST,
    MEASURED,
    PASSES,
    Target,
    figures,
    mean_error,
    measured_end,
    passes_of_end,
)
from eupmu_jax.methods.eupmu_budget import FIRMNESS
from eupmu_jax.methods.eupmu_explicit import FAMILY, PAPER, barrier
from eupmu_jax.methods.method import (
    FORGET_OBJECTIVE,
    Cost,
    LogUniform,
    Method,
    Procedure,
    Settings,
    descent,
    keep_original,
    loss_of,
)
from eupmu_jax.surgery.explicit import unilateral_surgery
from eupmu_jax.surgery.nonfinite import skip_nonfinite
from eupmu_jax.surgery.steps import explicit_step
from eupmu_jax.tasks import Task

# Found on digits alone, see experiments/level; what follows was not searched.
PROPORTIONAL, INTEGRAL, MAX_WEIGHT, RETAIN_WEIGHT = 50.0, 0.2, 2.0, 3.0
# Of the retain weight. The integral part is for a class that is to go: what is retained is unlike it, and can be held
# at the limit. At random the first steps pass the limit on both sets alike, and its sum would slow down the others.
RETAIN_GAIN, RETAIN_INTEGRAL, MAX_RETAIN_WEIGHT = 100.0, 20.0, 30.0
DECAY = 0.9
# Where steps become longer than the learning rate, up to so many times as long: short of that share of the target, and
# below that share of what the retain error may rise by. Found on digits and emoji, see experiments/level.
LONGEST, NEAR, SAFE = 30.0, 0.5, 0.5
# Of the averaged parameters, in shares of the run.
AVERAGED = 0.1
# A target that is none: as far as the limit allows.
UNLIMITED = 1e30
# Gains are those of rates, which were found where unseen data has an error of about 10 %. Another error is counted in
# units in which its way to the target is as long; one that is nearly there counts as if a twentieth were missing.
WAY, SHORTEST = 0.1, 0.05
# Of a rate, or of a unit of another error.
ALLOWED_ERROR = LogUniform(0.003, 0.03)


def eupmu_level(task: Task, terms, settings) -> Procedure:
    r"""Surgery whose forget gradient has a weight that vanishes at `target`, the error of data that was never seen.

    The chain is `forget_level`, `retain_limit`, `unilateral_surgery` with tolerance 0 and a least multiplier of 3,
    the descent of all methods, and `scale_by_limit`. `forget_level` reads the error of each forget batch, the other two
    that of each retain batch, which may exceed the original model's on the whole retain set by `allowed_error`, in the
    unit of `task.error` (0.01 is a point of accuracy), or go up to an absolute `limit`, if that is set. Where a class
    is to go, `retain_limit` has an integral part. The first steps are a tenth of the learning rate; they become longer,
    up to 30 times as long, while the forget error is short of half of the target and the retain error has risen by less
    than half of what it may. With `allowed_rise` the retain loss may rise by so many nats at most, under the budget of
    `eupmu_budget`, and all steps have their full length.

    The gains are those of rates. An error that is none, such as a squared error, is measured by its way from the
    original model's on the forget set to the target: the gains are larger where the way is shorter, and "half of the
    target" is half of that way. So nothing depends on the unit of such an error.

    The end is measured, on a twelfth of each set, 100 to 1,000 examples, or the whole of fewer than 200: of the last
    parameters, their average over the end of the run, and three points on the way from the original to the last ones,
    that one is chosen that keeps the limit and is nearest to the target, up to the noise of the sample: that of a rate,
    or of the errors of the examples. Of an error that is no rate the target is moved by as much as the original model's
    error on the sample differs from that on the set. Where all is to go that the task has an `unknown` error of, points
    past that are as good as it: it is that of the mean of what else could be said, the least that a model which does
    not know has. The point is checked on up to 500 retained examples, which also
    decide where the sample exceeds the limit by one example at most. If it does not keep the limit there, what the
    sample missed of its rise is taken to grow with the way, and it is the nearest point that keeps the limit then; the
    original parameters keep any `allowed_error`. Where none of the points keeps an absolute `limit`, that with the
    least retain error is returned. All is measured in batches as large as those of the retain set.
    """
    loss = with_errors(task, settings["forget_objective"])
    limit = error_limit(terms.retain_error, settings)
    in_nats = "allowed_rise" in settings
    tolerance = barrier(terms, settings, FIRMNESS) if in_nats else 0.0
    target, unit = settings["target"], unit_of(task, settings["target"], terms.forget_error)
    optimizer = skip_nonfinite(
        optax.chain(
            forget_level(
                target,
                proportional=settings.get("proportional", PROPORTIONAL) / unit,
                integral=settings.get("integral", INTEGRAL) / unit,
                decay=DECAY,
                max_weight=settings.get("max_weight", MAX_WEIGHT),
            ),
            optax.identity() if limit is None else _retain_weight(task, limit, target, unit),
            unilateral_surgery(tolerance, retain_weight=settings.get("retain_weight", RETAIN_WEIGHT)),
            descent(terms, settings),
            optax.identity() if limit is None else _lengths(task, limit, target, terms),
        )
    )
    take = explicit_step(loss, optimizer, has_aux=True, errors=lambda aux: aux)
    decay = 1 - 1 / max(1, AVERAGED * terms.steps)

    def init(params, prepared):
        return optimizer.init(params), jax.tree.map(jnp.array, params)

    def step(params, prepared, state, batches, count, key):
        params, inner, _ = take(params, state[0], batches, key)
        return params, (inner, optax.tree_utils.tree_update_moment(params, state[1], decay, 1))

    def finish(params, state, prepared, forget, retain):
        # Of the error and of the loss.
        of_error = jnp.inf if limit is None else limit - terms.retain_error
        allowed = jnp.stack([of_error, settings["allowed_rise"] if in_nats else jnp.inf])
        begun = None if task.is_rate else terms.forget_error
        aim, ends = Target(target, begun, terms.at_least), (prepared, params, state[1])
        return measured_end(task, (forget, retain), terms.retain_batch, aim, allowed, *ends)

    cost = Cost((1, 1), (1, 1), outside_forward=passes_of_end(terms.num_forget, terms.num_retain))
    measured = functools.partial(figures, task), terms.retain_batch
    return Procedure(init, step, cost, keep_original, finish, (measured,))


def unit_of(task: Task, target: chex.Numeric, forget_error: chex.Numeric) -> chex.Numeric:
    """What errors are counted in: 1 for a rate, else 10 ways from the original model's forget error to the target.

    A way of less than a twentieth of the target counts as one. Without a target the unit is 1, too.
    """
    if task.is_rate:
        return 1.0
    way = jnp.maximum(target - forget_error, SHORTEST * target) / WAY
    return jnp.where((way > 0) & (target < UNLIMITED), way, 1.0)


def error_limit(retain_error: chex.Numeric, settings: Settings) -> chex.Numeric | None:
    """What the error of the retain set may be: the absolute limit, or the rise above its start; None for neither."""
    if "limit" in settings:
        return settings["limit"]
    return retain_error + settings["allowed_error"] if "allowed_error" in settings else None


def _retain_weight(task, limit, target, unit):
    """How much the retain gradients weigh above the limit."""
    integral = 0.0 if task.num_classes is None else jnp.where(target >= 1, RETAIN_INTEGRAL, 0.0)
    gain = RETAIN_GAIN / unit
    return retain_limit(limit, proportional=gain, integral=integral, decay=DECAY, max_weight=MAX_RETAIN_WEIGHT)


def _lengths(task, limit, target, terms):
    """How long steps are."""
    safe = limit - (1 - SAFE) * jnp.maximum(limit - terms.retain_error, 0)
    near = jnp.minimum(terms.forget_error + NEAR * jnp.maximum(target - terms.forget_error, 0), target)
    return scale_by_limit(limit, _noise_of_batch(task, limit, terms.retain_batch), target=near, safe=safe, most=LONGEST)


def _noise_of_batch(task, limit, count):
    """What a retain batch may exceed a figure by: two standard deviations of a rate; of other errors, the limit."""
    if task.num_classes is None:
        return limit
    # At 0 and 1 too a batch may be wrong by one example.
    least, most = 1 / (count + 1), count / (count + 1)
    return lambda figure: 2 * jnp.sqrt(jnp.clip(figure, least, most) * (1 - jnp.clip(figure, least, most)) / count)


def with_errors(task: Task, forget_objective: str) -> SharedForward:
    """Forget and retain losses as `loss_of`, each with the mean error of its batch as its aux."""
    outputs, heads = loss_of(task, forget_objective)

    def both(head):
        return lambda outputs, batch: (head(outputs, batch), jax.lax.stop_gradient(mean_error(task, outputs, batch)))

    return shared_forward(outputs, [both(head) for head in heads])


METHOD = Method(
    eupmu_level,
    PAPER + ", to the level of unseen data",
    f"1F 1B forget and retain, {PASSES}F of a twelfth of both sets after, {LEAST} to {MEASURED:,} examples, "
    f"2F of others, until {CHECKED} retained ones are measured",
    "forget, retain and held-out set",
    {
        # Lower than of the others: where forgetting needs longer steps, they become longer by themselves.
        "learning_rate": LogUniform(1e-4, 3.16e-3),
        "forget_objective": FORGET_OBJECTIVE,
        "allowed_error": ALLOWED_ERROR,
    },
    optional=("target", "limit", "allowed_rise", "proportional", "integral", "max_weight", "retain_weight"),
    family=FAMILY,
    version=7,
)
