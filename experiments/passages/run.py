"""A small language model forgets passages that it has memorised; it is compared with a model trained without them.

Command:  uv run python experiments/passages/run.py
Time:     about 12 minutes on 2 cores.
Result:   experiments/passages/rows.jsonl: one row for the original, the retrained and each unlearned model; those of
          older versions of a method are made again.

The text is the Devil's Dictionary (Debian's package dict-devil): the first 64 bytes of 877 entries. 10 % of them are
never shown to any model, and 10 % of the others are the forget set. The model is a byte-level decoder of 0.4 million
parameters. Exact memorisation is the share of a passage's bytes that the model predicts from the preceding ones. All
settings are defaults: nothing was tuned here.
"""

import argparse
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import eupmu_jax as eupmu
from eupmu_jax.benchmark import rows
from eupmu_jax.benchmark.problems import RETRAINED_SEED_OFFSET
from eupmu_jax.data import passages
from eupmu_jax.methods import METHODS as ALL_METHODS
from eupmu_jax.models.decoder import SIZES, Decoder
from eupmu_jax.tasks import Examples
from eupmu_jax.training.fitting import fit_task
from experiments import origin

LENGTH, EPOCHS, STEPS = 64, 80, 200
METHODS = ("EUPMU", "weighted sum", "gradient ascent", "fine-tuning", "SCRUB", "NGDiff")
SHOWN = 24  # bytes of a passage given as the prompt


@functools.cache
def model():
    """The task of the decoder, with its fresh parameters."""
    size = SIZES["tiny"]._replace(vocab=passages.VOCABULARY)
    graph, _ = nnx.split(Decoder(size, rngs=nnx.Rngs(0)))
    fresh = lambda key: nnx.to_pure_dict(nnx.state(Decoder(size, rngs=nnx.Rngs(key)), nnx.Param))
    return eupmu.tasks.language(lambda params, tokens: nnx.merge(graph, params)(tokens), fresh_params=fresh)


def split(count: int, seed: int) -> dict[str, np.ndarray]:
    """Ids of held-out, forget and retain passages."""
    order = np.random.default_rng(seed).permutation(count)
    tenth = count // 10
    return dict(
        zip(("held_out", "forget", "retain"), np.split(order, [tenth, tenth + (count - tenth) // 10]), strict=True)
    )


def train(task, tokens: np.ndarray, ids: np.ndarray, seed: int, epochs: int = EPOCHS):
    """A decoder trained on the passages `ids`, and the seconds that it took."""
    params = task.fresh_params(jax.random.key(seed))
    options = {"epochs": epochs, "batch_size": 32, "learning_rate": 3e-3, "seed": seed}
    fitted = fit_task(task, params, Examples({"tokens": tokens}, ids), **options)
    return fitted.params, fitted.seconds


@functools.partial(jax.jit, static_argnums=0)
def _error(task, params, batch):
    return jnp.mean(task.error(task.outputs(params, batch, None), batch))


def memorised(task, params, tokens: np.ndarray) -> float:
    """Exact memorisation of passages, in %."""
    return 100 * float(1 - _error(task, params, {"tokens": tokens}))


@functools.partial(jax.jit, static_argnums=0)
def _next(task, params, tokens, at):
    return jnp.argmax(task.outputs(params, {"tokens": tokens}, None)[0, at - 1])


def continued(task, params, passage: np.ndarray) -> str:
    """A passage's first bytes with the model's greedy continuation."""
    tokens = np.array(passage)[None]
    for at in range(SHOWN, len(passage)):
        tokens[0, at] = _next(task, params, tokens, at)
    return passages.text_of(tokens[0])


def missing(found: list[dict], methods=METHODS) -> list[str]:
    """The models without a row of the current version of their method."""
    present = {"original": None, "retrained": None, **{name: ALL_METHODS[name].version for name in methods}}
    done = {(row["model"], row.get("version")) for row in found}
    return [name for name, version in present.items() if (name, version) not in done]


def run(
    out: Path,
    seed: int,
    made_by: dict,
    *,
    methods=METHODS,
    count: int | None = None,
    length: int = LENGTH,
    epochs: int = EPOCHS,
    steps: int = STEPS,
) -> list[dict]:
    """Trains, unlearns and evaluates on the first `count` passages of `length` bytes; appends and returns its rows.

    Models that already have rows in the file are skipped.
    """
    wanted = missing(rows.select(rows.read(out), seed=seed), methods)
    if not wanted:
        return []
    task, tokens = model(), passages.load(length)[:count]
    ids = split(len(tokens), seed)
    sets = {name: {"tokens": tokens[part]} for name, part in ids.items()}
    original, seconds = train(task, tokens, np.concatenate([ids["forget"], ids["retain"]]), seed, epochs)
    retrained, retraining = train(task, tokens, ids["retain"], seed + RETRAINED_SEED_OFFSET, epochs)
    found = []

    def add(name, params, **more):
        figures = {f"{part}_memorised": memorised(task, params, tokens[of]) for part, of in ids.items()}
        passage = tokens[ids["forget"][0]]
        samples = {"passage": passages.text_of(passage), "sample": continued(task, params, passage)}
        found.append({"model": name, "seed": seed, **figures, **samples, **more})
        rows.append(out, found[-1] | made_by)

    for name, params, spent in (("original", original, seconds), ("retrained", retrained, retraining)):
        if name in wanted:
            add(name, params, seconds=spent.processor)
    for method in [name for name in methods if name in wanted]:
        options = {"steps": steps, "seed": seed, "forget_batch": 16, "retain_batch": 48, "warm": True, "probes": 1}
        result = eupmu.unlearn(method, task, original, **sets, **options)
        share = 100 * result.processor_seconds / retraining.processor
        more = {"share_of_retraining": share, "version": ALL_METHODS[method].version}
        add(method, result.params, figures=result.figures, share=result.share, **more)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("rows.jsonl"))
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        for row in run(arguments.out, seed, origin.of(__file__, "--seeds", seed)):
            figures = "  ".join(
                f"{name} {row[f'{name}_memorised']:5.1f} %" for name in ("forget", "retain", "held_out")
            )
            print(f"{row['model']:<16} {figures}  {row['sample']!r}")


if __name__ == "__main__":
    main()
