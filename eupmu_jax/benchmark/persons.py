"""A language model that forgets persons: its fine-tuning, its evaluation, and relearning.

SmolLM2-135M-Instruct learns questions and answers about some persons of `data.persons` with low-rank adapters;
unlearning changes the adapters too. The evaluation is TOFU's, in `benchmark.answers`. Needs the extra `language`.
"""

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import numpy as np

from eupmu_jax import tasks
from eupmu_jax.benchmark import answers
from eupmu_jax.benchmark.answers import Respondent
from eupmu_jax.data import persons
from eupmu_jax.data.questions import Questions
from eupmu_jax.metrics import rounded, separation
from eupmu_jax.models.language import (
    LanguageModel,
    Tokenizer,
    gguf_tokenizer,
    load_gguf,
    merge_lora,
    smollm2,
    with_lora,
)
from eupmu_jax.tasks import Examples, Task
from eupmu_jax.training import fitting
from eupmu_jax.training._identity import digest_of_model
from eupmu_jax.training.fitting import Trained, fit_task, trained
from eupmu_jax.training.relearning import relearn

# Numbers of persons to be forgotten, retained and never shown.
FORGOTTEN, RETAINED, HELD_OUT = 12, 48, 24
# How an answer follows its question; tokens of both, of a question with other answers, and of a generated answer.
TEMPLATE = "{question} {answer}"
LENGTH, LONGER, ANSWER = 27, 35, 20
RANK, EPOCHS, BATCH, LEARNING_RATE = 16, 6, 16, 1e-3
# Questions of the retain set and of world facts that are evaluated, and how many of five wrong answers are used.
JUDGED, WRONG = 32, 3
# Bits of rounded weights.
BITS = 4
# Questions of each kind whose answers are shown.
SHOWN = 3
# How many of the `FORGOTTEN` persons are relearned, and in how many steps.
TAUGHT, RELEARNING = 4, 8


class Sets(NamedTuple):
    """Questions about the forgotten, retained and never shown persons of one seed, and about world facts."""

    forget: Questions
    retain: Questions
    held_out: Questions
    world_facts: Questions


@functools.cache
def model() -> tuple[LanguageModel, Tokenizer]:
    """The pretrained model with adapters that are still zero in effect, and its tokenizer."""
    base = _pretrained()
    return with_lora(base, base.params, RANK, key=jax.random.key(0)), gguf_tokenizer(smollm2())


@functools.cache
def _pretrained():
    return load_gguf(smollm2())


def merged(params: chex.ArrayTree) -> tuple[LanguageModel, chex.ArrayTree]:
    """The model without adapters, and its parameters with these adapters merged in."""
    return _pretrained(), merge_lora(_pretrained().params, params)


def respondent() -> Respondent:
    """The model and how it is prompted."""
    return Respondent(*model(), TEMPLATE, LENGTH, LONGER, ANSWER)


@functools.cache
def task() -> Task:
    """The task of the model, cached so that all measurements share one object."""
    return tasks.language(model()[0].apply)


@functools.cache
def sets(seed: int) -> Sets:
    """Persons drawn from the benchmark of this seed, with those of their questions that are short enough."""
    splits, rng = persons.load(10, seed=seed), np.random.default_rng([seed, 7])

    def some(part: Questions, count: int) -> Questions:
        chosen = rng.permutation(np.unique(part.person))[:count]
        return _usable(part.take(np.flatnonzero(np.isin(part.person, chosen))))

    parts = some(splits.forget, FORGOTTEN), some(splits.retain, RETAINED), some(splits.holdout, HELD_OUT)
    world = splits.world_facts.take(rng.permutation(len(splits.world_facts.question)))
    return Sets(*parts, _usable(world))


def _usable(part):
    short = answers.fitting(respondent(), part)
    return short._replace(wrong_answers=tuple(some[:WRONG] for some in short.wrong_answers or ()))


def joined(*parts: Questions) -> Questions:
    """The questions of all parts."""
    together = {
        name: sum((getattr(part, name) for part in parts), ()) for name in Questions._fields if name != "person"
    }
    return Questions(**together, person=np.concatenate([part.person for part in parts]))


def spread(part: Questions, count: int) -> Questions:
    """At most `count` questions, spread over the set."""
    return part.take(np.unique(np.linspace(0, len(part.question) - 1, count).astype(int)))


def measured(retain: Questions) -> Questions:
    """The questions about retained persons whose error is measured: more than are judged, as the limit is on all."""
    return spread(retain, 3 * JUDGED)


def shown(parts: Sets) -> tuple[Questions, Questions, Questions]:
    """Questions whose answers are shown: about forgotten persons, similar retained ones, and capitals."""
    words = lambda part, row: {*part.question[row].split(), *part.answer[row].split()}
    forget, kept = spread(parts.forget, SHOWN), parts.retain
    near = [
        max(range(len(kept.question)), key=lambda row: len(words(kept, row) & words(forget, k))) for k in range(SHOWN)
    ]
    capitals = [row for row, question in enumerate(parts.world_facts.question) if "is the capital of" in question]
    return forget, kept.take(near), parts.world_facts.take(capitals[:SHOWN])


def train(part: Questions, seed: int, cache: Path, on_step: Callable[[], None] = lambda: None) -> Trained:
    """Fine-tunes fresh adapters on these questions, or returns the checkpoint of the same training from `cache`."""
    batch, fresh = answers.encoded(respondent(), part), model()[0].params
    recipe: dict[str, Any] = {"epochs": EPOCHS, "batch_size": BATCH, "learning_rate": LEARNING_RATE}
    chosen = hashlib.sha256(batch["tokens"].astype("<i4").tobytes()).hexdigest()
    base = digest_of_model(task(), fresh, answers.examples(batch))
    model_of = {"model": f"smollm2, rank {RANK}", "base": base}
    meta = {"data": "persons", **model_of, "tokens": chosen, "seed": seed, "recipe": recipe}

    make = lambda: fit_task(task(), fresh, answers.examples(batch), seed=seed, on_step=on_step, **recipe)
    return trained(cache, fresh, meta | {"jax": jax.__version__}, make)


def steps_of(part: Questions) -> int:
    """Optimizer steps that `train` makes on these questions."""
    return fitting.steps_of(len(part.question), epochs=EPOCHS, batch_size=BATCH)


def as_tofu(params: chex.ArrayTree, parts: Sets) -> dict[str, Any]:
    """`answers.judge` on all forgotten persons, and on some questions about retained ones and world facts."""
    world = {"world": spread(parts.world_facts, JUDGED)}
    return answers.judge(respondent(), params, parts.forget, spread(parts.retain, JUDGED), world)


def judge(params: chex.ArrayTree, parts: Sets) -> dict[str, Any]:
    """The figures of `as_tofu`, `separation` and `int4`.

    `separation` is that of the forgotten persons from those who were never shown, from which `metrics.privleak` is
    computed. `int4` is the error on forget and retain set after rounding the weights of the whole model to four bits.
    """
    found, kept = as_tofu(params, parts), measured(parts.retain)
    scores = [answers.membership(respondent(), params, part) for part in (parts.forget, parts.held_out)]
    whole, weights = merged(params)
    coarse, weights = respondent()._replace(language=whole), rounded(weights, BITS)
    return found | {
        "error": found["error"] | {"retain": answers.error(respondent(), params, kept)},
        "separation": separation(*scores),
        "int4": {
            "forget": answers.error(coarse, weights, parts.forget),
            "retain": answers.error(coarse, weights, kept),
        },
    }


def relearned(params: chex.ArrayTree, parts: Sets, seed: int) -> dict[str, float]:
    """How much relearning some forgotten persons recovers of the others.

    Returns:
      `before` and `after`: % of the tokens in the other persons' answers that the model predicts before and after a few
      steps of fine-tuning on the first `TAUGHT` persons.
    """
    batch, people = answers.encoded(respondent(), parts.forget), np.unique(parts.forget.person)
    taught = np.isin(parts.forget.person, people[:TAUGHT])
    train, watch = (Examples(batch, np.flatnonzero(chosen)) for chosen in (taught, ~taught))
    options: dict[str, Any] = {"batch_size": BATCH // 2, "learning_rate": LEARNING_RATE / 2, "seed": seed}
    curve = relearn(task(), params, train, watch, steps=RELEARNING, every=RELEARNING, **options)
    return {"before": float(curve.accuracy[0]), "after": float(curve.accuracy[-1])}
