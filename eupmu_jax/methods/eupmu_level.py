"""EUPMU to the level of unseen data: how far to forget is measured, not tuned."""

import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import optax

from eupmu_jax._stack.programs import jit_for_task
from eupmu_jax.controllers import forget_level, retain_limit, scale_by_limit
from eupmu_jax.gradients.batches import SharedForward, shared_forward
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
    loss_of,
    size_of,
)
from eupmu_jax.surgery.explicit import unilateral_surgery
from eupmu_jax.surgery.nonfinite import skip_nonfinite
from eupmu_jax.surgery.steps import explicit_step
from eupmu_jax.tasks import Task
from eupmu_jax.tasks.examples import spread

# Found on digits alone, see experiments/level; what follows was not searched.
PROPORTIONAL, INTEGRAL, MAX_WEIGHT, RETAIN_WEIGHT = 50.0, 0.2, 2.0, 3.0
RETAIN_GAIN, MAX_RETAIN_WEIGHT = 100.0, 10.0
DECAY = 0.9
# Where steps become longer than the learning rate, up to so many times as long: short of that share of the target, and
# below that share of what the retain error may rise by. Found on digits and emoji, see experiments/level.
LONGEST, NEAR, SAFE = 30.0, 0.5, 0.5
# Of the averaged parameters, in shares of the run.
AVERAGED = 0.1

# How many examples of each set the end is chosen on, how many retained ones must bear it out, and where on the way back
# to the original parameters. A twelfth of a small set would say next to nothing, and the whole of a large one would
# cost more than the steps.
MEASURED, LEAST = 1_000, 100
SHARE = 12
_WAY = (0.85, 0.65, 0.4, 0.0)
_PASSES = 2 + len(_WAY)


def eupmu_level(task: Task, terms, settings) -> Procedure:
    r"""Surgery whose forget gradient has a weight that vanishes at `target`, the error of data that was never seen.

    The chain is `forget_level`, `retain_limit`, `unilateral_surgery` with tolerance 0 and a least multiplier of 3,
    the descent of all methods, and `scale_by_limit`. `forget_level` reads the error of each forget batch, the other two
    that of each retain batch, which may exceed the original model's on the whole retain set by `allowed_error`, in the
    unit of `task.error` (0.01 is a point of accuracy), or go up to an absolute `limit`, if that is set. The first steps
    are a tenth of the learning rate; they become longer, up to 30 times as long, while the forget error is short of
    half of the target and the retain error has risen by less than half of what it may. With `allowed_rise` the
    retain loss may rise by so many nats at most, under the budget of `eupmu_budget`, and all steps have their full
    length.

    The end is measured, on a twelfth of each set, 100 to 1,000 examples, or the whole of fewer than 200: of the last
    parameters, their average over the end of the run, and three points on the way from the original to the last ones,
    that one is chosen that keeps the limit and is nearest to the target, up to the noise of the sample. It must keep
    the limit on more than 500 retained examples too, up to 1,000 (of a smaller set, on all but fewer than 100), or the
    next best point is tried; the passes of one such check are counted in the cost, those of others not. With
    `allowed_error` the original parameters keep it always; with an absolute `limit` perhaps none does, and that with
    the least retain error is returned.
    """
    loss = with_errors(task, settings["forget_objective"])
    limit = error_limit(terms.retain_error, settings)
    in_nats = "allowed_rise" in settings
    tolerance = barrier(terms, settings, FIRMNESS) if in_nats else 0.0
    optimizer = skip_nonfinite(
        optax.chain(
            forget_level(
                settings["target"],
                proportional=settings.get("proportional", PROPORTIONAL),
                integral=settings.get("integral", INTEGRAL),
                decay=DECAY,
                max_weight=settings.get("max_weight", MAX_WEIGHT),
            ),
            optax.identity()
            if limit is None
            else retain_limit(limit, proportional=RETAIN_GAIN, decay=DECAY, max_weight=MAX_RETAIN_WEIGHT),
            unilateral_surgery(tolerance, retain_weight=settings.get("retain_weight", RETAIN_WEIGHT)),
            descent(terms, settings),
            optax.identity() if limit is None else _lengths(task, limit, settings["target"], terms),
        )
    )
    take = explicit_step(loss, optimizer, has_aux=True, errors=lambda aux: aux)
    decay = 1 - 1 / max(1, AVERAGED * terms.steps)

    def init(params, prepared):
        return optimizer.init(params), jax.tree.map(jnp.array, params)

    def step(params, prepared, state, batches, count, key):
        params, inner, _ = take(params, state[0], batches, key)
        return params, (inner, optax.tree_utils.tree_update_moment(params, state[1], decay, 1))

    sizes = terms.num_forget, terms.num_retain
    counts = [size if size < 2 * LEAST else min(MEASURED, max(LEAST, -(-size // SHARE))) for size in sizes]
    # In parts of one size, so that nothing is compiled twice and a large model holds no more at once.
    parts = min(MEASURED, terms.num_retain) // counts[1]

    def finish(params, state, prepared, forget, retain):
        samples = [part[spread(len(part), n)] for part, n in zip((forget, retain), counts, strict=True)]
        # Of the error and of the loss.
        of_error = jnp.inf if limit is None else limit - terms.retain_error
        allowed = jnp.stack([of_error, settings["allowed_rise"] if in_nats else jnp.inf])
        positions = spread(len(retain), parts * counts[1])

        def on_more(params):
            return sum(_figures(task, params, retain[positions[part::parts]]) for part in range(parts)) / parts

        check = on_more if parts > 1 else None
        return _best_end(task, samples, check, settings["target"], allowed, prepared, params, state[1])

    # Of one point; of others, which are asked only where that one does not hold, none are counted.
    checked = 2 * parts * counts[1] if parts > 1 else 0
    cost = Cost((1, 1), (1, 1), outside_forward=sum(counts) * _PASSES + checked)
    measured = functools.partial(_figures, task), max(counts)
    return Procedure(init, step, cost, lambda params, forget, retain, key: params, finish, (measured,))


def error_limit(retain_error: chex.Numeric, settings: Settings) -> chex.Numeric | None:
    """What the error of the retain set may be: the absolute limit, or the rise above its start; None for neither."""
    if "limit" in settings:
        return settings["limit"]
    return retain_error + settings["allowed_error"] if "allowed_error" in settings else None


def _lengths(task, limit, target, terms):
    """How long steps are."""
    safe = limit - (1 - SAFE) * jnp.maximum(limit - terms.retain_error, 0)
    margin = _margin(task, limit, terms.retain_batch)
    return scale_by_limit(limit, margin, target=NEAR * target, safe=safe, most=LONGEST)


def _margin(task, limit, count):
    """What a retain batch may exceed the limit by: two standard deviations of a rate; of other errors, the limit."""
    if task.num_classes is None:
        return limit
    rate = jnp.clip(limit, 1 / (count + 1), count / (count + 1))
    return 2 * jnp.sqrt(rate * (1 - rate) / count)


def mean_error(task: Task, outputs: chex.ArrayTree, batch: chex.ArrayTree) -> chex.Array:
    """The mean of the task's error on a batch, or its retain loss where it has no error."""
    return task.retain(outputs, batch) if task.error is None else jnp.mean(task.error(outputs, batch))


def with_errors(task: Task, forget_objective: str) -> SharedForward:
    """Forget and retain losses as `loss_of`, each with the mean error of its batch as its aux."""
    outputs, heads = loss_of(task, forget_objective)

    def both(head):
        return lambda outputs, batch: (head(outputs, batch), jax.lax.stop_gradient(mean_error(task, outputs, batch)))

    return shared_forward(outputs, [both(head) for head in heads])


def _best_end(task, samples, on_more, target, allowed, original, last, averaged):
    """`(params, share)` of the point of the path that keeps the limit and is nearest to the target.

    It keeps the limit on the retain sample, and by `on_more(params)`, figures on more of the retain set, if that is
    given. Where none keeps it, that with the least retain error. One point is made at a time, and one program measures
    all of them: of a large model, six would not fit, and would compile six times as long.
    """
    back = [functools.partial(_between, original, last, way) for way in _WAY[:-1]]
    points: list[Callable[[], chex.ArrayTree]] = [lambda: last, lambda: averaged, *back, lambda: original]
    found = [[_figures(task, point(), part) for part in samples] for point in points]
    forget, retain = (jnp.stack([figures[side] for figures in found]) for side in range(2))
    # What cannot be told from the target by this sample is as good as it, and of such points the first is taken.
    noise = 1.96 * jnp.sqrt(jnp.clip(target * (1 - target), 0) / size_of(samples[0]))
    distance = jnp.maximum(jnp.abs(forget[:, 0] - target), noise)
    candidates = jnp.all(retain <= retain[-1] + allowed, axis=1) & jnp.isfinite(distance)
    limits = on_more(original) + allowed if on_more else None
    for point in map(int, jnp.argsort(distance)):
        if candidates[point] and (on_more is None or jnp.all(on_more(points[point]()) <= limits)):
            break
    else:
        point = int(jnp.argmin(jnp.where(jnp.isfinite(retain[:, 0]), retain[:, 0], jnp.inf)))
    return points[point](), (1.0, 1.0, *_WAY)[point]


@jit_for_task()
def _figures(task, params, batch):
    outputs = task.outputs(params, batch, None)
    return jnp.stack([mean_error(task, outputs, batch), task.retain(outputs, batch)])


@jax.jit
def _between(original, last, way):
    return jax.tree.map(lambda a, b: (a + way * (b - a)).astype(a.dtype), original, last)


METHOD = Method(
    eupmu_level,
    PAPER + ", to the level of unseen data",
    f"1F 1B forget and retain, {_PASSES}F of a twelfth of both sets after, {LEAST} to {MEASURED:,} examples, "
    f"2F of up to {MEASURED:,} retained ones",
    "forget, retain and held-out set",
    {
        # Lower than of the others: where forgetting needs longer steps, they become longer by themselves.
        "learning_rate": LogUniform(1e-4, 3.16e-3),
        "forget_objective": FORGET_OBJECTIVE,
        "allowed_error": LogUniform(0.003, 0.03),
    },
    optional=("target", "limit", "allowed_rise", "proportional", "integral", "max_weight", "retain_weight"),
    family=FAMILY,
    version=5,
)
