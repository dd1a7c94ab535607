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
from eupmu_jax.training.unlearning import Plan, affordable_steps, run_method


class Job(NamedTuple):
    """A part of a benchmark that one process does alone.

    Attributes:
      design: Name of the design.
      settings: Some of the design's settings; one alone for a method.
      seeds: Problems to be reported.
      method: Name of a method; None trains and judges the models.
    """

    design: str
    settings: tuple[designs.Setting, ...]
    seeds: tuple[int, ...]
    method: str | None

    @property
    def setting(self) -> designs.Setting:
        """That of a method's job."""
        return self.settings[0]


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
        for setting in job.settings:
            for seed in job.seeds:
                _models(design, setting, seed, place, _Writer(job.design, setting, place, made))
    else:
        _method(job, design, place, _Writer(job.design, job.setting, place, made))


class _Writer(NamedTuple):
    """Appends a row unless it is there."""

    design: str
    setting: designs.Setting
    place: Place
    made: list[dict]

    def key(self, **fields) -> dict:
        versions = saved.versions(self.design, fields.get("method"))
        return {**fields, "design": self.design, "forget": self.setting.forget, **versions}

    def has(self, **fields) -> bool:
        return bool(rows.select(self.made, **self.key(**fields)))

    def add(self, make: Callable[[], dict], **fields) -> None:
        if not self.has(**fields):
            rows.append(self.place.rows, self.key(**fields) | make() | rows.provenance(self.place.command))


def _models(design, setting, seed, place, writer):
    """Rows of the original and the retrained model."""
    protocol.keep_split(design, setting, seed, place.out / "splits")
    names = ("original", "retrained")
    if all(writer.has(kind="model", model=name, seed=seed) for name in names):
        return
    problem = protocol.problem(design, setting, seed, place.cache)
    for name, judged, model in (
        ("original", problem.judged_original, problem.original),
        ("retrained", problem.judged_retrained, problem.retrained),
    ):
        writer.add(functools.partial(_model_row, problem, judged, model, design), kind="model", model=name, seed=seed)


def _model_row(problem, judged, model, design):
    return {
        **judged.figures,
        **protocol.divergences(judged, problem.judged_retrained, problem.task.split),
        "gap": metrics.average_gap(judged.figures, problem.judged_retrained.figures),
        "relearning": protocol.relearning_curves(problem.task, model.params, design),
        "split": data.digest(problem.task.split),
        "seconds": model.seconds,
        "processor_seconds": model.processor_seconds,
        "forward": model.examples,
        "backward": model.examples,
    }


def _method(job, design, place, writer):
    """Rows of all trials, then of the runs with the settings that the trials chose."""
    method = METHODS[job.method]
    name = "/".join((job.design, job.setting.forget, job.method))
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


def _unlearn(job, design, problem, settings, warm):
    plan = Plan(job.setting.steps, job.setting.forget_batch, job.setting.retain_batch, probes=0)
    settings = settings | {"optimizer": design.optimizer}
    plan = plan._replace(steps=affordable_steps(job.method, settings, plan, problem.task))
    retain_loss = problem.judged_original.figures["retain_loss"]
    arguments = {"seed": problem.task.seed, "retain_loss": retain_loss, "warm": warm}
    return run_method(job.method, settings, plan, problem.task, problem.original.params, **arguments)


def _trial_row(job, design, place, settings):
    problem = protocol.problem(design, job.setting, design.tuning_seed, place.cache)
    result = _unlearn(job, design, problem, settings, warm=False)
    judged = protocol.judge(protocol.sample(design, job.setting, design.tuning_seed), result.params, design.shadow_size)
    original, retrained = problem.judged_original.figures, problem.judged_retrained.figures
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
    problem = protocol.problem(design, job.setting, seed, place.cache)
    result = _unlearn(job, design, problem, settings, warm=True)
    judged = protocol.judge(problem.task, result.params, design.shadow_size, metrics.FEATURES)
    original, retrained = problem.judged_original.figures, problem.judged_retrained.figures
    return {
        **judged.figures,
        **protocol.divergences(judged, problem.judged_retrained, problem.task.split),
        "gap": metrics.average_gap(judged.figures, retrained),
        "rise": judged.figures["retain_loss"] - original["retain_loss"],
        "relearning": protocol.relearning_curves(problem.task, result.params, design),
        "settings": settings,
        "split": data.digest(problem.task.split),
        "seconds": result.seconds,
        "processor_seconds": result.processor_seconds,
        "compile_seconds": result.compile_seconds,
        "share_of_retraining": 100 * _seconds(result) / _seconds(problem.retrained),
        "forward": result.forward,
        "backward": result.backward,
        # A backward pass costs about two forward passes; training makes one of each.
        "passes_of_retraining": 100 * (result.forward + 2 * result.backward) / (3 * problem.retrained.examples),
    }


def _seconds(timed):
    """Of the processor where that is what computes, so that other work on the machine does not count."""
    return timed.processor_seconds if jax.default_backend() == "cpu" else timed.seconds
