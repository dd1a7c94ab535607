"""`unlearn`: runs any method on any task, from a forget set and a retain set to unlearned parameters."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from eupmu_jax.methods.method import Settings
from eupmu_jax.methods.passes import examples_passed
from eupmu_jax.tasks import Task
from eupmu_jax.training import _warn, loop
from eupmu_jax.training._clock import Seconds, Stopwatch
from eupmu_jax.training._reached import Reached, reached
from eupmu_jax.training._ready import ready
from eupmu_jax.training._step import jitted_step, parted, together
from eupmu_jax.training._streams import paired_batches
from eupmu_jax.training._watch import Watch, progress_bar, show
from eupmu_jax.training.levels import check_told
from eupmu_jax.training.mesh.placement import Carry, laid_out
from eupmu_jax.training.rounds import NO_TEST, ends_of, told_apart

# The same tree comes out as goes in, and type checkers should know it.
Params = TypeVar("Params")


class Unlearned(NamedTuple, Generic[Params]):
    """An unlearned model, and the record of the run that produced it.

    Attributes:
      params: The final parameters, after the last step and whatever the method does at its end.
      history: Dict of lists of equal length: `step`, `retain_loss` and `forget_loss` (the task's retain loss on both
        sets), `retain_error` and `forget_error`, `multiplier`, `weight` (of the forget gradient), and `cosine` between
        the gradients of the two objectives (for a method without the setting `forget_objective`: between those of the
        retain loss and of `random_labels` or else the task's first forget loss); NaN where a value does not exist.
        Measured on at most 2,000 examples of each set, `cosine` on at most as many as a step takes. Empty without
        probes. A resumed run includes the points of its earlier parts.
      figures: Losses and errors of the original parameters (`original`), those after the last step (`last`) and those
        returned (`returned`), on the same examples: `forget_loss`, `retain_loss`, with held-out data `held_out_loss`,
        and `forget_error` and so on where the task has an error. Empty without probes.
      share: Fraction of the path from the original to the last parameters that the measured limit allowed: 1 if the
        limit cost nothing, 0 if nothing could be forgotten within it. 1 for influence, whose one step comes after the
        last of the run, and None for all other methods that measure no end.
      seconds, processor_seconds: Time for preparation, steps and end, without probes; with `warm` also without
        compilation. For a run in parts, the time of all parts up to their last checkpoints.
      compile_seconds: Compilation time with `warm`; else 0.
      forward, backward: Examples that the method passed through the model: in its steps, in what it measures before and
        after them, and, for a measured target, the held-out data. Starting figures and probes are not counted.
      level: For a method that steers to a level: its target, what it reached, and the cost to the retain set. None for
        other methods, and without probes.
      steps: Steps made.
      ended: What ended the run: "steps" for a fixed number; with `steps=None` "reached" if forgotten and unseen
        examples could no longer be told apart, else "budget".
    """

    params: Params
    history: dict[str, list[float]]
    figures: dict[str, dict[str, float]]
    share: float | None
    seconds: float
    processor_seconds: float
    compile_seconds: float
    forward: int
    backward: int
    level: Reached | None = None
    steps: int = 0
    ended: str = "steps"


def unlearn(
    method: str,
    task: Task,
    params: Params,
    forget: Any,
    retain: Any,
    held_out: Any = None,
    *,
    steps: int | None = 300,
    settings: Settings | None = None,
    seed: int = 0,
    forget_batch: int = 64,
    retain_batch: int = 192,
    frozen: "Any | Callable[[Any], Any] | None" = None,
    mesh: Mesh | None = None,
    directory: "str | Path | None" = None,
    save_every: int = 100,
    probes: int = 10,
    budget: int | None = None,
    progress: bool = False,
    on_step: Callable[[], None] = lambda: None,
    start: "Mapping[str, float] | None" = None,
    warm: bool = False,
) -> Unlearned[Params]:
    """Makes a trained model forget examples, by any method on any task.

    Args:
      method: "EUPMU", which forgets to the level of unseen data within a limit on the retain error, or a key of
        `methods.METHODS`; `eupmu methods` lists them.
      task: A task of `eupmu_jax.tasks`, or one of your own.
      params: Parameters of the original model: any pytree of arrays, such as a dict or the `nnx.Param`s of a Flax NNX
        model (do not include BatchNorm statistics: they would be trained as well). They are not modified.
      forget, retain: Trees of arrays with a common leading axis, or any objects with `len(data)` and
        `data[positions] -> batch` for an array of positions. Trees are copied to the device as a whole, memory maps
        too; on a mesh they stay on the host. An object is read batch by batch, so it may be larger than memory. Both
        must give batches of the same structure. Examples that appear in both cause a warning. To forget more in a
        second call, on the result of the first, leave what the first forgot out of `retain` too, or it is learned
        again, without a warning.
      held_out: Examples that the model never saw, in the same form. EUPMU forgets to their level, with the classes of a
        classifier mixed as in the forget set. A class, or a condition of a diffusion model, that the retain set lacks
        is forgotten completely. No other group that the retain set lacks is recognised, such as a user or an item of a
        recommender. To forget one, hold out groups that the model never saw at all: on unseen ratings of users that it
        knows, its error is lower than that of a model that never saw them. Without held-out data the level is
        `task.unknown` of the forget set if the task has it, else chance, which is logged: 1 - 1 / classes for a
        classifier, 1 for other rates and for errors that are all 0 or 1, otherwise no level. Figures on held-out data
        are reported next to the others.
      steps: Optimizer steps. None runs EUPMU transport until forgotten and unseen examples can no longer be told apart
        by their scores (see `training.rounds`), in rounds of doubling length, or until the budget is spent.
      settings: Settings of the method, such as
        `{"forget_objective": "npo", "learning_rate": 1e-4, "retain_weight": 1.0}`. None takes the middle of the range
        that the benchmark searches, and the task's first forget loss as `forget_objective`; EUPMU fills in single
        missing settings in the same way. Nearly all methods also read `optimizer` ("adam", "muon" or "sgd"; use the
        transforms for others), `momentum` and `weight_decay`; `eupmu methods` says which do, and the others warn.
        EUPMU reads `allowed_error` (the allowed rise of the retain error), or instead `limit` (an absolute retain
        error) or `allowed_rise` (of the retain loss, in nats), and `target` (the forget error). Rises count from
        `params`, so those of one run after another add up, while `limit` bounds them together. Errors are in units of
        `task.error`: for a classifier 0.01 is one point of accuracy. If no limit is set and the error is not a rate,
        the retain error may rise by about a tenth of the distance from the forget error to its target: by 0.095 of it,
        which matches the default of 0.95 points for a rate with a target of 10 %.
      seed: Seed of the order of the examples and of all keys.
      forget_batch, retain_batch: Examples in each step; the whole set if it is smaller.
      frozen: Tree of bools like `params`, True for the leaves to keep unchanged, or a function of `params` that returns
        such a tree. The method never sees frozen leaves: they are constants of the compiled programs, which each call
        compiles anew and drops at its end. For a large model, and on a mesh that splits parameters, set
        JAX_USE_SIMPLIFIED_JAXPR_CONSTANTS=1 in the environment; JAX then passes them as arguments and keeps their
        sharding.
      mesh: Mesh to run on. Parameters are placed by `sharding.param_shardings`, except those already on the mesh, which
        keep their layout. Examples are split along the axis `data`, whose size must divide the batch sizes; a set
        smaller than its batch is cut to fit. The task must take any number of examples: figures are measured in
        parts of any size, which a `shard_map` over `data` inside it would refuse.
      directory: Directory for checkpoints: a path, or a string with a URL such as gs://bucket/run, which needs gcsfs.
        The same call resumes from the last one, and on the same devices gives the same result bit for bit. None saves
        nothing.
      save_every: Steps between checkpoints.
      probes: How often losses are measured during the run, in addition to the start, each time on at most 2,000
        examples of each set. With 0 nothing is measured, nor compiled for it.
      budget: With `steps=None`, the most examples that the steps may pass forward and backward, such as a tenth of what
        retraining would: `0.1 * epochs * len(retain)`. None is 32 passes over the forget set.
      progress: Whether to show a progress bar, and the figures at the end; requires rich.
      on_step: Called after each step.
      start: `retain_loss` and `retain_error` of the original model over the whole retain set, if known; otherwise they
        are measured.
      warm: Whether to compile everything in advance, so that `seconds` excludes compilation.

    Returns:
      The unlearned parameters, and how both losses developed. Runs that differ only in the numbers of `settings` share
      compiled code.

    Raises:
      ValueError: Before any step: for an unknown method or setting, a task that lacks a function the method needs or
        whose functions return something else, sets that are empty or of different structure, a number that is not
        positive, a batch that the mesh cannot split evenly, parameters that are not floating point arrays, or a
        checkpoint of another run.
      InterruptedError: If SIGTERM ended the run. Its checkpoint is complete; repeat the call to resume.

    A warning is given if the limit took back more than half of the run's progress, which retain figures alone would not
    show. For a method that steers to a level, it is given only if probes show that the forget error is also less than
    halfway to its target.

    >>> from eupmu_jax import tasks
    >>> inputs = jax.random.normal(jax.random.key(0), (64, 8))
    >>> labels = jnp.argmax(inputs @ jax.random.normal(jax.random.key(1), (8, 3)), axis=1)
    >>> data = {"inputs": inputs, "labels": labels}
    >>> forget, retain = (jax.tree.map(lambda leaf: leaf[part], data) for part in (slice(8), slice(8, None)))
    >>> task = tasks.classification(lambda params, inputs: inputs @ params, num_classes=3)
    >>> result = unlearn("weighted sum", task, jnp.zeros((8, 3)), forget, retain, steps=20)
    >>> result.params.shape, result.history["step"][-1]
    ((8, 3), 20)
    """
    counts: dict[str, Any] = {"steps": steps, "forget_batch": forget_batch, "retain_batch": retain_batch}
    counts |= {"save_every": save_every, "probes": probes, "seed": seed}
    options: dict[str, Any] = {"settings": settings, "frozen": frozen, "mesh": mesh, "directory": directory}
    run = ready(method, task, params, (forget, retain, held_out), counts, start=start, budget=budget, **options)
    task, sets, settings, aim, procedure = run.task, run.sets, run.settings, run.aim, run.procedure
    # NumPy integers cannot be written as JSON.
    steps, save_every, probes, seed = run.terms.steps, int(save_every), int(probes), int(seed)
    draw_key, step_key, prepare_key = (jax.random.key(seed + offset) for offset in range(3))
    prepare = lambda: (procedure.prepare or _nothing)(run.params, sets.forget, sets.retain, prepare_key)
    watch = Watch(task, settings, sets, run.held_out, seed, steps, probes, sum(run.sizes))
    clock = Stopwatch(watch.history)
    if warm:
        prepared = jax.block_until_ready(prepare())
        if procedure.finish:
            state = procedure.init(run.params, prepared)
            jax.block_until_ready(procedure.finish(run.params, state, prepared, sets.forget, sets.retain))
    clock.start()
    prepared = jax.block_until_ready(prepare())
    clock.stop()

    # The step donates its arguments; the caller keeps the original ones.
    params = jax.tree.map(jnp.array, run.params)
    carry = Carry(params, procedure.init(params, prepared), step_key)
    # With frozen parameters the step must not outlive the run, so it bypasses the cache.
    compiled = jitted_step if frozen is None else jitted_step.__wrapped__
    numbers, choices = parted(settings)
    take = compiled(run.chosen.make, task, run.terms, choices, sets.in_memory)
    carry, take = (together(carry), take) if mesh is None else laid_out(carry, take, mesh)
    epoch = lambda count: count // -(-len(sets.forget) // run.sizes[0])

    def advance(carry, count, positions):
        fed = sets.feed(task, draw_key, epoch(int(count)), positions)
        known = prepared if run.targets is None else (prepared, sets.alongside(run.targets[positions[0]]))
        extra = known, numbers, run.start, fed, count, epoch(int(count)), draw_key, carry.key
        params, state = take(carry.params, carry.state, *extra)
        if jax.default_backend() == "cpu":
            # With several steps in flight, a model that calls back into Python can deadlock.
            jax.block_until_ready(params)
        return Carry(params, state, carry.key), ()

    rounds = ends_of(run.terms.rounds)
    test = told_apart(task, sets.forget, run.held_out, aim.gone) if aim is not None and rounds else NO_TEST
    is_reached = lambda count, carry: count in rounds and not test.differ(carry.params)

    compile_seconds = 0.0
    if warm:
        copied = carry._replace(**jax.tree.map(jnp.array, {"params": carry.params, "state": carry.state}))
        compiling, first = Seconds.now(), next(paired_batches(sets.counts, run.sizes, seed))
        jax.block_until_ready(advance(copied, np.int32(0), first))
        compile_seconds = Seconds.now().since(compiling).wall

    with progress_bar(method, steps, progress) as advance_bar:
        watch.record(0, carry, draw_key)
        watch.add_figures("original", run.params)
        measured = watch.figures.get("original", {})
        if measured:
            check_told("forget", task, run.params, sets.forget, measured["forget_loss"])
        for name in ("forget", "held_out"):
            _warn.of_lost(name, {key: value for key, value in measured.items() if key.startswith(name)})
        if aim is not None and task.is_rate and "forget_error" in measured:
            # The steps do without the rate at the start; `ready` has measured, and warned of, any other error.
            _warn.of_reached(measured["forget_error"], aim.target)
        clock.start()

        def after_step(count, carry):
            on_step()
            advance_bar(count)
            if count in watch.steps:
                jax.block_until_ready(carry.params)
                clock.stop()
                watch.record(count, carry, draw_key)
                clock.start()
            clock.save()

        ended = loop.run(
            advance,
            carry,
            lambda step: paired_batches(sets.counts, run.sizes, seed, step),
            steps=steps,
            directory=directory,
            meta=run.meta,
            history=watch.history,
            save_every=save_every,
            on_step=after_step,
            stop=is_reached,
        )
    if ended.preempted:
        raise InterruptedError(f"SIGTERM after step {ended.step}, which is saved in {directory}; call again to resume")
    last, share = ended.carry.params, None
    returned = last
    if procedure.finish:
        returned, share = procedure.finish(last, ended.carry.state, prepared, sets.forget, sets.retain)
        share = float(share)
        if mesh is not None:
            returned = jax.device_put(returned, jax.tree.map(lambda leaf: leaf.sharding, last))
    jax.block_until_ready(returned)
    clock.stop()
    spent = clock.total()
    if not probes:
        # Earlier parts of the run may have had probes.
        watch.history.clear()
    watch.add_figures("last", last)
    watch.add_figures("returned", returned)
    level = None
    if aim is not None and probes:
        level = reached(task, returned, run.params, sets, run.held_out, aim, run.start, settings)
    _warn.of_share(share, aim, level, run.start)
    _warn.of_end(ended.carry, returned, steps, level, run.start)
    made = ended.step
    forward, backward = examples_passed(procedure.cost, made, run.sizes)
    forward += 0 if aim is None else aim.passes
    forward += test.examples * sum(count <= made for count in rounds)
    cause = "steps" if not rounds else "reached" if ended.reached else "budget"
    if progress:
        show(watch.figures, share, level, task.is_rate)
    figures = watch.history, watch.figures, share, *spent, compile_seconds, forward, backward, level
    return Unlearned(run.whole(returned), *figures, made, cause)


def _nothing(*_):
    return ()
