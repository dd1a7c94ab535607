"""What one process of the benchmark does: trains, tunes a method, runs it on every seed; each result is a row."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from eupmu_jax import data, metrics
from eupmu_jax.benchmark import designs, protocol, rows, saved, tuning
from eupmu_jax.methods import METHODS
from eupmu_jax.methods.passes import affordable_steps
from eupmu_jax.training.unlearning import unlearn


class Job(NamedTuple):
    """A part of a benchmark that one process does alone.

    Attributes:
      design: Name of the design.
      cases: Some of the design's cases; one alone for a method.
      seeds: Problems to be reported.
      method: Name of a method; None trains and judges the models.
    """

    design: str
    cases: tuple[designs.Case, ...]
    seeds: tuple[int, ...]
    method: str | None

    @property
    def case(self) -> designs.Case:
        """That of a method's job."""
        return self.cases[0]


class Place(NamedTuple):
    """Where a benchmark is kept, and what is taken from there.

    Attributes:
      out: Folder of `rows.jsonl`, `tuning.db` and `cache/`, the trained models and compiled code.
      command: For the rows.
    """

    out: Path
    command: str

    @property
    def rows(self) -> Path:
        """The file of all rows."""
        return self.out / "rows.jsonl"

    @property
    def studies(self) -> Path:
        """The file of Optuna's studies."""
        return self.out / "tuning.db"

    @property
    def cache(self) -> Path:
        """The folder of what could be made again."""
        return self.out / "cache"

    def read(self) -> list[dict]:
        """The rows that count."""
        return saved.read(self.rows)


def run(job: Job, place: Place) -> None:
    """Does what is missing of a job, and appends its rows one by one."""
    design = designs.design(job.design)
    made = place.read()
    if job.method is None:
        for case in job.cases:
            for seed in job.seeds:
                _models(design, case, seed, place, _Writer(job.design, case, place, made))
    else:
        _method(job, design, place, _Writer(job.design, job.case, place, made))


class _Writer(NamedTuple):
    """Appends a row unless it is there."""

    design: str
    case: designs.Case
    place: Place
    made: list[dict]

    def key(self, **fields) -> dict:
        versions = saved.versions(self.design, fields.get("method"))
        return {**fields, "design": self.design, "forget": self.case.forget, **versions}

    def has(self, **fields) -> bool:
        return bool(rows.select(self.made, **self.key(**fields)))

    def add(self, make: Callable[[], dict], **fields) -> None:
        if not self.has(**fields):
            rows.append(self.place.rows, self.key(**fields) | make() | rows.provenance(self.place.command))


def _models(design, case, seed, place, writer):
    """Rows of the original and the retrained model."""
    protocol.keep_split(design, case, seed, place.out / "splits")
    names = ("original", "retrained")
    if all(writer.has(kind="model", model=name, seed=seed) for name in names):
        return
    reference = protocol.reference(design, case, seed, place.cache)
    for name, judged, model in (
        ("original", reference.judged_original, reference.original),
        ("retrained", reference.judged_retrained, reference.retrained),
    ):
        writer.add(functools.partial(_model_row, reference, judged, model, design), kind="model", model=name, seed=seed)


def _model_row(reference, judged, model, design):
    return {
        **judged.figures,
        **protocol.divergences(judged, reference.judged_retrained, reference.problem.split),
        "gap": metrics.average_gap(judged.figures, reference.judged_retrained.figures),
        "relearning": protocol.relearning_curves(reference.problem, model.params, design),
        "split": data.digest(reference.problem.split),
        "seconds": model.seconds,
        "processor_seconds": model.processor_seconds,
        "forward": model.examples,
        "backward": model.examples,
    }


def _method(job, design, place, writer):
    """Rows of all trials, then of the runs with the settings that the trials chose."""
    method = METHODS[job.method]
    name = "/".join((job.design, job.case.forget, job.method))
    study = tuning.Study(place.studies, name, method)
    for index in range(design.trials):
        make = functools.partial(_trial_row, job, design, place, study.settings(index))
        writer.add(make, kind="trial", method=job.method, trial=index, seed=design.tuning_seed)
    trials = tuning.trials_of(place.read(), writer.key(kind="trial", method=job.method))
    for row in trials:
        study.tell(row["trial"], row["settings"], row["blind"])
    chosen = {tuning.best(trials, score) for score in design.scores}
    for seed in job.seeds:
        for index in sorted(chosen):
            make = functools.partial(_run_row, job, design, place, study.settings(index), seed)
            writer.add(make, kind="run", method=job.method, trial=index, seed=seed)


def _unlearn(job, design, reference, settings, warm):
    problem, case = reference.problem, job.case
    settings = settings | {"optimizer": design.optimizer}
    forget, retain, batches = problem.forget, problem.retain, (case.forget_batch, case.retain_batch)
    counts = len(forget), len(retain)
    steps = affordable_steps(job.method, settings, problem.task, counts, case.steps, batches)
    return unlearn(
        job.method,
        problem.task,
        reference.original.params,
        forget,
        retain,
        steps=steps,
        settings=settings,
        seed=problem.seed,
        forget_batch=case.forget_batch,
        retain_batch=case.retain_batch,
        retain_loss=reference.judged_original.figures["retain_loss"],
        probes=0,
        warm=warm,
    )


def _trial_row(job, design, place, settings):
    reference = protocol.reference(design, job.case, design.tuning_seed, place.cache)
    result = _unlearn(job, design, reference, settings, warm=False)
    judged = protocol.judge(protocol.sample(design, job.case, design.tuning_seed), result.params, design.shadow_size)
    original, retrained = reference.judged_original.figures, reference.judged_retrained.figures
    gap, blind = metrics.average_gap(judged.figures, retrained), tuning.blind_score(judged.figures, original)
    diverged = not np.isfinite([gap, blind, judged.figures["retain_loss"]]).all()
    return {
        **judged.figures,
        "settings": settings,
        "diverged": diverged,
        "blind": tuning.DIVERGED if diverged else blind,
        "gap": tuning.DIVERGED if diverged else gap,
        "rise": judged.figures["retain_loss"] - original["retain_loss"],
    }


def _run_row(job, design, place, settings, seed):
    reference = protocol.reference(design, job.case, seed, place.cache)
    result = _unlearn(job, design, reference, settings, warm=True)
    judged = protocol.judge(reference.problem, result.params, design.shadow_size, metrics.FEATURES)
    original, retrained = reference.judged_original.figures, reference.judged_retrained.figures
    return {
        **judged.figures,
        **protocol.divergences(judged, reference.judged_retrained, reference.problem.split),
        "gap": metrics.average_gap(judged.figures, retrained),
        "rise": judged.figures["retain_loss"] - original["retain_loss"],
        "relearning": protocol.relearning_curves(reference.problem, result.params, design),
        "settings": settings,
        "split": data.digest(reference.problem.split),
        "seconds": result.seconds,
        "processor_seconds": result.processor_seconds,
        "compile_seconds": result.compile_seconds,
        "share_of_retraining": 100 * _seconds(result) / _seconds(reference.retrained),
        "forward": result.forward,
        "backward": result.backward,
        # A backward pass costs about two forward passes; training makes one of each.
        "passes_of_retraining": 100 * (result.forward + 2 * result.backward) / (3 * reference.retrained.examples),
    }


def _seconds(timed):
    """Of the processor where that is what computes, so that other work on the machine does not count."""
    return timed.processor_seconds if jax.default_backend() == "cpu" else timed.seconds
