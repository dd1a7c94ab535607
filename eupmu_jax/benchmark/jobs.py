"""The jobs of a benchmark, and the rows that each of them lacks, computed one by one."""

from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from eupmu_jax import data, metrics
from eupmu_jax.benchmark import designs, problems, protocol, rows, saved, tuning
from eupmu_jax.methods import METHODS, default_settings
from eupmu_jax.methods.passes import affordable_steps
from eupmu_jax.training.unlearning import unlearn


class Job(NamedTuple):
    """A part of a benchmark that one process does alone.

    Attributes:
      design: Name of the design.
      cases: Some of the design's cases; only one for a method.
      seeds: Seeds of the problems to be reported.
      method: Name of a method; None trains and evaluates the models.
    """

    design: str
    cases: tuple[designs.Case, ...]
    seeds: tuple[int, ...]
    method: str | None


class Place(NamedTuple):
    """Where a benchmark is stored.

    Attributes:
      out: Folder of `rows.jsonl` and of `cache/`, with trained models and compiled code.
      command: Command that the rows record.
    """

    out: Path
    command: str

    @property
    def rows(self) -> Path:
        """The file of all rows."""
        return self.out / "rows.jsonl"

    @property
    def cache(self) -> Path:
        """The folder of what can be recomputed."""
        return self.out / "cache"

    def read(self) -> list[dict]:
        """The rows that count."""
        return saved.read(self.rows)


class Piece(NamedTuple):
    """One row to be computed.

    Attributes:
      design, case, seed: The problem.
      kind: "model", "trial" or "run".
      model: For the kind "model": "original" or "retrained".
      method, trial: For the other kinds; the trial is the index of its settings, or `tuning.UNTUNED`.
    """

    design: str
    case: designs.Case
    seed: int
    kind: str
    model: str | None = None
    method: str | None = None
    trial: int | str | None = None

    def key(self) -> dict:
        """The fields that identify the row."""
        named = {"model": self.model, "method": self.method, "trial": self.trial}
        fields = {name: value for name, value in named.items() if value is not None}
        about = {"kind": self.kind, **fields, "seed": self.seed, "design": self.design, "forget": self.case.forget}
        return about | saved.versions(self.design, self.method)


def missing(job: Job, made: list[dict]) -> list[Piece]:
    """The rows of a job that can be computed now and are not in `made`; none if it is finished.

    Runs come after all trials of a method, which select their settings.
    """
    design, pieces = designs.design(job.design), []
    made = [row for row in made if row.get("method") == job.method and row["design"] == job.design]
    for case in job.cases:
        if job.method is None:
            models = ("original", "retrained")
            pieces += [Piece(job.design, case, seed, "model", model=name) for seed in job.seeds for name in models]
            continue
        of_method = Piece(job.design, case, design.tuning_seed, "trial", method=job.method)
        trials = [of_method._replace(trial=index) for index in range(design.trials)]
        if lacking := [piece for piece in trials if not rows.select(made, **piece.key())]:
            pieces += lacking
            continue
        found = tuning.trials_of(made, of_method.key())
        chosen: list[int | str] = sorted({tuning.best(found, score) for score in design.scores})
        chosen += [tuning.UNTUNED] if METHODS[job.method].steers else []
        pieces += [of_method._replace(kind="run", seed=s, trial=index) for s in job.seeds for index in chosen]
    return [piece for piece in pieces if not rows.select(made, **piece.key())]


def run(job: Job, place: Place) -> None:
    """Computes the missing rows of a job, and appends them one by one."""
    while pieces := missing(job, place.read()):
        for piece in pieces:
            rows.append(place.rows, make(piece, place))


def make(piece: Piece, place: Place) -> dict:
    """Computes a row, with its key and with what is needed to reproduce it."""
    of_kind = {"model": _model_row, "trial": _trial_row, "run": _run_row}[piece.kind]
    return piece.key() | of_kind(piece, designs.design(piece.design), place) | rows.provenance(place.command)


def prepare(job: Job, place: Place) -> None:
    """Trains and evaluates the models of a job that the cache lacks."""
    for case in job.cases:
        for seed in job.seeds:
            protocol.reference(designs.design(job.design), case, seed, place.cache)


def keep_compiled_code(folder: Path) -> None:
    """Sets the folder of JAX's compilation cache for this process.

    A folder that the user chose (JAX_COMPILATION_CACHE_DIR) is left as it is.
    """
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def _model_row(piece, design, place):
    protocol.keep_split(design, piece.case, piece.seed, place.out / "splits")
    reference = protocol.reference(design, piece.case, piece.seed, place.cache)
    judged, model = {
        "original": (reference.judged_original, reference.original),
        "retrained": (reference.judged_retrained, reference.retrained),
    }[piece.model]
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


def _unlearn(piece, design, reference, warm):
    problem, case = reference.problem, piece.case
    settings = tuning.settings(METHODS[piece.method], piece.trial)
    settings = settings or default_settings(METHODS[piece.method], problem.task)
    forget, retain, batches = problem.forget, problem.retain, (case.forget_batch, case.retain_batch)
    result = unlearn(
        piece.method,
        problem.task,
        reference.original.params,
        forget,
        retain,
        problem.held_out,
        steps=affordable_steps(
            piece.method, settings, problem.task, (len(forget), len(retain)), case.steps, batches, design.held_out
        ),
        settings=settings,
        seed=problem.seed,
        forget_batch=case.forget_batch,
        retain_batch=case.retain_batch,
        start=problems.start_of(reference.judged_original.figures),
        probes=0,
        warm=warm,
    )
    return settings, result


def _trial_row(piece, design, place):
    reference = protocol.reference(design, piece.case, piece.seed, place.cache)
    settings, result = _unlearn(piece, design, reference, warm=False)
    judged = protocol.judge(protocol.sample(design, piece.case, piece.seed), result.params, design.shadow_size)
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


def _run_row(piece, design, place):
    reference = protocol.reference(design, piece.case, piece.seed, place.cache)
    settings, result = _unlearn(piece, design, reference, warm=True)
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
    """Processor seconds on a CPU, so that other work on the machine does not count; elsewhere wall-clock seconds."""
    return timed.processor_seconds if jax.default_backend() == "cpu" else timed.seconds
