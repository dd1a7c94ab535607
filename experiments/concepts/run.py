"""A diffusion model that draws emoji from words forgets flags; it is compared with a model that never saw one.

Command:  uv run python experiments/concepts/run.py
Time:     about an hour on one core; a rerun resumes. Needs the emoji (see `eupmu_jax.data.emoji`).
Result:   experiments/concepts/rows.jsonl: a row for each model; those of older versions of a method are made again.
          samples.npz: what some of them draw.

A U-Net of 0.35 million parameters draws images of 32 x 32 pixels, conditioned on the mean of the embeddings of a bag of
words. It is trained on the emoji whose names contain one of seven words, the concepts. A classifier trained only on
real emoji decides which concept a sample shows. Methods have the default settings of `unlearn`.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import eupmu_jax as eupmu
from eupmu_jax.benchmark import rows
from eupmu_jax.benchmark.problems import RETRAINED_SEED_OFFSET
from eupmu_jax.methods import METHODS as ALL_METHODS
from eupmu_jax.methods import default_settings
from eupmu_jax.training.levels import measured_level
from eupmu_jax.training.relearning import relearn_part
from experiments import origin
from experiments.concepts.models import (
    CONCEPTS,
    EPOCHS,
    SHAPE,
    classifier,
    data,
    judge,
    plain_task,
    prompts_of,
    samples,
    sets,
    task,
    train,
)

ROWS, SAMPLES = (Path(__file__).with_name(name) for name in ("rows.jsonl", "samples.npz"))
STEPS, FORGET_BATCH, RETAIN_BATCH = 200, 32, 64
METHODS = ("EUPMU", "weighted sum")
# EUPMU again, with the retrained model's loss as its target instead of the level that it finds.
TOLD = "EUPMU, told the level"
# Samples for the forgotten concept after its word was learned again, and the steps of that.
ATTACKED, RELEARNING = 64, 150
# The seed of the page and its picture.
SEED = 0
# The picture's models, words, and samples for each.
PICTURED, NEIGHBOURS, SHOWN = ("original", "EUPMU", TOLD, "retrained"), ("flag", "face", "clock", "arrow"), 8


def relearned(params, seed: int) -> float:
    """The share, in %, of the samples for flags that show one after retraining only that word's embedding on flags."""
    word = data().words.index(CONCEPTS[0])
    mask = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, bool), params)
    mask["conditions"]["embedding"] = mask["conditions"]["embedding"].at[word].set(True)
    options = {"steps": RELEARNING, "learning_rate": 1e-2, "seed": seed, "batch_size": FORGET_BATCH}
    params = relearn_part(plain_task(), params, mask, sets()[0], **options)
    shown = np.asarray(classifier()[0](samples(params, prompts_of(0, ATTACKED), seed + 1)))
    return float(100 * np.mean(shown == 0))


def missing(found: list[dict]) -> list[str]:
    """The methods without a row of their current version."""
    done = {(row["model"], row.get("version")) for row in found}
    return [name for name in (TOLD, *METHODS) if (name, ALL_METHODS[name.split(",")[0]].version) not in done]


def run(seed: int, out: Path, cache: Path, made_by: dict, epochs: int = EPOCHS) -> None:
    """Appends a row for each model that has none yet."""
    forget, retain = sets()
    original, _ = train(np.arange(len(data().concepts)), seed, cache, epochs)
    retrained, seconds = train(retain.ids, seed + RETRAINED_SEED_OFFSET, cache, epochs)
    level = lambda params, part: measured_level(plain_task(), params, part).error
    start = level(original, retain)
    found = rows.select(rows.read(out), seed=seed) if out.is_file() else []
    done = {row["model"] for row in found}

    def add(model, params, **more):
        figures = {"shown": judge(params, seed), "relearned": relearned(params, seed), "judge": classifier()[1]}
        figures |= {"rise": level(params, retain) - start, "forget_loss": level(params, forget)}
        if model in PICTURED and seed == SEED:
            keep(model, params, out.with_name(SAMPLES.name))
        # Written last, as a model with a row is not made again.
        rows.append(out, {"model": model, "seed": seed, **figures, **more} | made_by)
        print(model, figures, flush=True)

    for name, params in {"original": original, "retrained": retrained}.items():
        if name not in done:
            add(name, params)
    erasing, wanted = task(original), level(retrained, forget)
    for name in missing(found):
        method = name.split(",")[0]
        given = default_settings(ALL_METHODS[method], erasing) | ({"target": wanted} if name == TOLD else {})
        options = {"steps": STEPS, "seed": seed, "forget_batch": FORGET_BATCH, "retain_batch": RETAIN_BATCH}
        result = eupmu.unlearn(
            method, erasing, original, forget, retain, settings=given, **options, probes=1, warm=True
        )
        more = {"settings": given, "version": ALL_METHODS[method].version}
        more |= {"share_of_retraining": 100 * result.processor_seconds / seconds}
        if result.level is not None:
            more |= {"target": result.level.target, "limit": result.level.limit - result.level.start}
        add(name, result.params, **more)


def keep(name: str, params, path: Path) -> None:
    """Adds samples for every concept, drawn from the same noise, to the file of pictures."""
    labels = np.concatenate([prompts_of(k, SHOWN) for k in range(len(CONCEPTS))])
    images = np.asarray(samples(params, labels, 0)).reshape(len(CONCEPTS), SHOWN, *SHAPE)
    pixels = np.round(127.5 * (images + 1)).astype(np.uint8)[[CONCEPTS.index(word) for word in NEIGHBOURS]]
    kept = dict(np.load(path)) if path.is_file() else {}
    np.savez_compressed(path, **kept | {name: pixels})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--out", type=Path, default=ROWS)
    parser.add_argument("--cache", type=Path, default=Path("eupmu_runs/models"))
    arguments = parser.parse_args()
    run(arguments.seed, arguments.out, arguments.cache, origin.of(__file__, "--seed", arguments.seed))


if __name__ == "__main__":
    main()
