"""A language model forgets persons: fine-tuned, retrained and untuned unlearned models, evaluated and relearned.

Command:  uv run --extra language python experiments/persons/run.py --seeds 0
Time:     three to four hours a seed on two cores; a rerun resumes.
Result:   experiments/persons/rows.jsonl: a row for each model. Rows of older versions of a method, or with fewer
          figures than the evaluation gives now, are made again.

Model, evaluation and relearning are those of `eupmu_jax.benchmark.persons`. Every candidate, a method with a forget
loss, has the default settings of `unlearn`: the middle of the method's search ranges.
"""

import argparse
import os
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    # Set before JAX is imported: pass pretrained weights to each program instead of embedding them in it.
    os.environ.setdefault("JAX_USE_SIMPLIFIED_JAXPR_CONSTANTS", "1")

import numpy as np

import eupmu_jax as eupmu
from eupmu_jax import tasks
from eupmu_jax.benchmark import answers, persons, rows, tuning
from eupmu_jax.benchmark.problems import RETRAINED_SEED_OFFSET
from eupmu_jax.data.questions import Questions
from eupmu_jax.methods import METHODS, default_settings
from eupmu_jax.tasks import Examples
from eupmu_jax.training.fitting import Trained
from experiments import origin

ROWS = Path(__file__).with_name("rows.jsonl")
STEPS, FORGET_BATCH, RETAIN_BATCH = 60, 8, 8
# The block, of 30, whose output RMU moves.
LAYER = 10
# The forget losses of objectives that change something else too: KL to the original model as the retain loss, or one
# minus the probability of an answer as the error.
FORGET_LOSSES = {"kl_minimisation": "gradient_ascent", "level_of_probability": "bounded_ascent"}
# Pairs of a method and an objective. Gradient difference is the weighted sum with gradient ascent.
CANDIDATES = (
    ("EUPMU", "bounded_ascent"),
    ("weighted sum", "gradient_ascent"),
    ("weighted sum", "npo"),
    ("weighted sum", "simnpo"),
    ("NGDiff", "gradient_ascent"),
    ("EUPMU budget", "bounded_ascent"),
    ("weighted sum", "bounded_ascent"),
    ("weighted sum", "dpo"),
    ("EUPMU implicit", "npo"),
    ("weighted sum", "rmu"),
    ("weighted sum", "undial"),
    ("EUPMU explicit", "npo"),
    ("weighted sum", "lrml"),
    ("weighted sum", "wga"),
    ("weighted sum", "satimp"),
    ("augmented Lagrangian", "bounded_ascent"),
    ("OFMU", "bounded_ascent"),
    ("EUPMU next-batch", "npo"),
    ("weighted sum", "kl_minimisation"),
    ("EUPMU", "level_of_probability"),
)


def task_of(objective: str, original) -> eupmu.Task:
    """The task, with the original model where the loss compares its predictions or its hidden states."""
    options = {
        "undial": {"original": original},
        "kl_minimisation": {"original": original, "retain": "kl"},
        "rmu": {"hidden": _hidden, "original": original, "retain": "rmu"},
        "level_of_probability": {"error": "probability"},
    }
    return tasks.language(persons.model()[0].apply, **options.get(objective, {}))


def _hidden(params, tokens):
    return persons.model()[0].hidden(params, tokens, LAYER)


def examples_of(objective: str, part: Questions, original) -> Examples:
    """The set, with the original model's likelihoods and with refusals where the loss needs them."""
    respondent = persons.respondent()
    batch = answers.encoded(respondent, part)
    if objective in ("dpo", "lrml"):
        batch |= {f"alternative_{name}": leaf for name, leaf in answers.encoded(respondent, part, part.refusal).items()}
    if objective in ("npo", "dpo", "lrml"):
        batch = tasks.with_reference(persons.task(), original, batch)
    return answers.examples(batch)


def settings_of(method: str, objective: str, task: eupmu.Task, trial: int | None = None) -> dict:
    """The middle of the method's ranges, or the settings of a trial, with the forget loss if the method takes one."""
    given = default_settings(METHODS[method], task) if trial is None else tuning.settings(METHODS[method], trial)
    loss = {"forget_objective": FORGET_LOSSES.get(objective, objective)}
    return given | loss if "forget_objective" in given else given


class Models(NamedTuple):
    """What the runs of one seed start from and are compared with.

    Attributes:
      seed, parts: The seed and its questions.
      original, retrained: The models.
      nll, lengths: Of the answers about retained persons, the first under the original model.
      missed: The share of their tokens that it does not predict.
    """

    seed: int
    parts: persons.Sets
    original: Trained
    retrained: Trained
    nll: np.ndarray
    lengths: np.ndarray
    missed: float


def models_of(seed: int, cache: Path) -> Models:
    """Fine-tunes both models of a seed, or loads them from `cache`."""
    parts, respondent = persons.sets(seed), persons.respondent()
    original = persons.train(persons.joined(parts.forget, parts.retain), seed, cache)
    retrained = persons.train(parts.retain, seed + RETRAINED_SEED_OFFSET, cache)
    nll, lengths, _ = answers.told(respondent, original.params, answers.encoded(respondent, parts.retain))
    missed = answers.error(respondent, original.params, parts.retain)
    return Models(seed, parts, original, retrained, nll, lengths, missed)


def start_of(objective: str, models: Models) -> dict:
    """Retain loss and error of the original model, as the task of this objective defines them."""
    nll, lengths = models.nll, models.lengths
    # The distance of the original model to itself.
    loss = 0.0 if objective in ("rmu", "kl_minimisation") else nll.sum() / lengths.sum()
    error = np.mean(1 - np.exp(-nll / lengths)) if objective == "level_of_probability" else models.missed
    return {"retain_loss": float(loss), "retain_error": float(error)}


def judged(models: Models, model: str, objective: str, params, **more) -> dict:
    """The row of a model; prints a summary of it."""
    figures = persons.judge(params, models.parts) | {"relearned": persons.relearned(params, models.parts, models.seed)}
    asked = persons.joined(*persons.shown(models.parts))
    figures |= {"answers": answers.answers(persons.respondent(), params, asked)}
    print(models.seed, model, objective, *(f"{figures[name]:.3f}" for name in ("probability", "utility")), flush=True)
    return {"model": model, "objective": objective, "seed": models.seed, **figures, **more}


def unlearn(
    models: Models, method: str, objective: str, trial: int | None = None, **more
) -> tuple[dict, eupmu.Unlearned]:
    """A candidate's settings, the middle of its ranges or those of a trial, and the result of `eupmu.unlearn`."""
    params, seed = models.original.params, models.seed
    task = task_of(objective, params)
    given = settings_of(method, objective, task, trial)
    sets = [examples_of(objective, part, params) for part in models.parts[:3]]
    options = {"steps": STEPS, "seed": seed, "forget_batch": FORGET_BATCH, "retain_batch": RETAIN_BATCH}
    options |= {"probes": 0, "start": start_of(objective, models), **more}
    return given, eupmu.unlearn(method, task, params, *sets, settings=given, **options)


def unlearned(models: Models, method: str, objective: str, trial: int | None = None) -> dict:
    """The row of a candidate, run with the middle of its ranges or the settings of a trial."""
    given, result = unlearn(models, method, objective, trial, warm=True)
    share = 100 * result.processor_seconds / models.retrained.processor_seconds
    more = {"share_of_retraining": share, "settings": given, "version": METHODS[method].version}
    return judged(models, method, objective, result.params, **more)


def missing(found: list[dict]) -> list[tuple[str, str]]:
    """The candidates without a row of the current version of their method."""
    done = {(row["model"], row["objective"], row.get("version")) for row in found}
    return [
        (method, objective)
        for method, objective in CANDIDATES
        if (method, objective, METHODS[method].version) not in done
    ]


def whole(found: list[dict]) -> list[dict]:
    """The rows that have all figures of `persons.judge`; `int4` is the newest."""
    return [row for row in found if "int4" in row]


def run(seed: int, out: Path, cache: Path, made_by: dict) -> None:
    """Appends a row for each model of a seed that has none yet."""
    models = models_of(seed, cache)
    found = whole(rows.select(rows.read(out), seed=seed)) if out.is_file() else []
    done = {row["model"] for row in found}
    pretrained = persons.model()[0].params
    references = {"pretrained": pretrained, "original": models.original.params, "retrained": models.retrained.params}
    for name, params in references.items():
        if name not in done:
            error = answers.error(persons.respondent(), params, models.parts.held_out)
            rows.append(out, judged(models, name, "", params, held_out_error=error) | made_by)
    for method, objective in missing(found):
        rows.append(out, unlearned(models, method, objective) | made_by)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=ROWS)
    parser.add_argument("--cache", type=Path, default=Path("eupmu_runs/models"))
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        run(seed, arguments.out, arguments.cache, origin.of(__file__, "--seeds", seed))


if __name__ == "__main__":
    main()
