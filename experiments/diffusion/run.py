"""A diffusion model of digits forgets a class: original, retrained, and methods side by side, judged by a classifier.

Command:  uv run python experiments/diffusion/run.py --seeds 0 1 2
Time:     about ten minutes a seed on 2 cores.
Result:   experiments/diffusion/rows.jsonl: a row for each model.

The model is a DiT of 0.3 million parameters on the 8 x 8 digits of scikit-learn, predicting v. The classifier has seen
real digits alone, never a sample. UA is the share of samples for the forgotten class that it takes for another; RA that
of the samples for the others that it takes for what was asked for. Settings are defaults: nothing was tuned.
"""

import argparse
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import eupmu_jax as eupmu
from eupmu_jax.benchmark import rows
from eupmu_jax.benchmark.problems import RETRAINED_SEED_OFFSET
from eupmu_jax.methods import METHODS as ALL_METHODS
from eupmu_jax.methods import default_settings
from eupmu_jax.metrics.frechet import frechet_distance
from eupmu_jax.models import MLP
from eupmu_jax.models.dit import DiT
from eupmu_jax.models.sampling import sample
from eupmu_jax.objectives import diffusion
from eupmu_jax.tasks import Examples
from eupmu_jax.training.fitting import fit
from eupmu_jax.training.levels import measured_level
from experiments import origin

CLASSES, SCHEDULE = 10, diffusion.cosine_schedule(1_000)
EPOCHS, STEPS, SAMPLES, RELEARNING = 300, 150, 64, 200
METHODS = {
    "fine-tuning": {},
    "weighted sum": {"forget_objective": "other_condition"},
    "weighted sum, unconditional": {"forget_objective": "unconditional"},
    "EUPMU explicit": {"forget_objective": "unconditional"},
    "EUPMU": {"forget_objective": "unconditional"},
}


@functools.cache
def data() -> dict[str, np.ndarray]:
    """All digits, with pixels in [-1, 1]."""
    pixels, labels = load_digits(return_X_y=True)
    return {"inputs": (pixels / 8 - 1).astype(np.float32).reshape(-1, 8, 8, 1), "labels": labels.astype(np.int32)}


@functools.cache
def model():
    """The network as a function, and its fresh parameters."""
    graph, _ = nnx.split(DiT(CLASSES, rngs=nnx.Rngs(0)), nnx.Param)
    fresh = lambda key: nnx.to_pure_dict(nnx.state(DiT(CLASSES, rngs=nnx.Rngs(key)), nnx.Param))
    return lambda params, x_t, t, labels: nnx.merge(graph, params)(x_t, t, labels), fresh


def task(original=None):
    """The task, whose targets are those of the original model where there is one."""
    denoise, fresh = model()
    return eupmu.tasks.diffusion(denoise, SCHEDULE, num_conditions=CLASSES, original=original, fresh_params=fresh)


def train(ids, seed, epochs=EPOCHS):
    """A model of these digits alone."""
    made = task()
    loss = lambda params, statistics, batch, key: (made.retain(made.outputs(params, batch, key), batch), statistics)
    params = made.fresh_params(jax.random.key(seed))
    options = {"epochs": epochs, "batch_size": 64, "learning_rate": 2e-3, "seed": seed}
    return fit(loss, params, {}, Examples(data(), ids), **options)


@functools.cache
def classifier():
    """Logits and features of images, by a network that has seen real digits alone."""
    graph, params = nnx.split(MLP((64, 128, 64, CLASSES), nnx.Rngs(0)), nnx.Param)
    made = eupmu.tasks.classification(lambda params, x: nnx.merge(graph, params)(x), CLASSES)
    loss = lambda params, statistics, batch, key: (made.retain(made.outputs(params, batch, key), batch), statistics)
    everything = Examples(data(), np.arange(len(data()["labels"])))
    options = {"epochs": 60, "batch_size": 64, "learning_rate": 1e-3, "seed": 0}
    fitted = nnx.merge(graph, fit(loss, nnx.to_pure_dict(params), {}, everything, **options).params)

    @jax.jit
    def both(images):
        hidden = images.reshape(len(images), -1)
        for layer in fitted.layers[:-1]:
            hidden = nnx.relu(layer(hidden))
        return fitted.layers[-1](hidden), hidden

    return both


def samples(params, labels, seed):
    """Images for these classes, by 50 DDIM steps under guidance 2."""
    return sample(model()[0], params, SCHEDULE, labels, (8, 8, 1), jax.random.key(seed), nothing=CLASSES)


def judge(params, forgotten, seed):
    """UA, RA and the Frechet distance on the retained classes; every model's samples come from the same noise."""
    labels = jnp.repeat(jnp.arange(CLASSES), SAMPLES)
    logits, features = classifier()(samples(params, labels, seed))
    right, is_forgotten = np.asarray(jnp.argmax(logits, -1) == labels), np.asarray(labels) == forgotten
    real = data()["inputs"][data()["labels"] != forgotten]
    distance = frechet_distance(np.asarray(features)[~is_forgotten], np.asarray(classifier()(real)[1]))
    ua, ra = 100 * (1 - right[is_forgotten].mean()), 100 * right[~is_forgotten].mean()
    return {"UA": float(ua), "RA": float(ra), "FD": distance}


def relearned(params, forgotten, ids, seed):
    """Parameters whose row of the forgotten class alone is trained again on its images (textual inversion)."""
    made, optimizer = task(), optax.adam(1e-2)
    put = lambda row: params | {"conditions": {"embedding": table.at[forgotten].set(row)}}
    table = jnp.asarray(params["conditions"]["embedding"])

    def step(carry, key):
        row, state = carry
        batch = jax.tree.map(lambda leaf: jax.random.choice(key, jnp.asarray(leaf[ids]), (64,)), data())
        loss = lambda row: made.retain(made.outputs(put(row), batch, key), batch)
        updates, state = optimizer.update(jax.grad(loss)(row), state)
        return (optax.apply_updates(row, updates), state), None

    keys = jax.random.split(jax.random.key(seed), RELEARNING)
    start = table[forgotten], optimizer.init(table[forgotten])
    return put(jax.jit(lambda start: jax.lax.scan(step, start, keys)[0][0])(start))


def run(seed: int, epochs: int = EPOCHS) -> list[dict]:
    """A row for each model."""
    labels, forgotten, found = data()["labels"], (seed + 1) % CLASSES, []
    everything = np.arange(len(labels))
    forget, retain = everything[labels == forgotten], everything[labels != forgotten]
    original, retrained = train(everything, seed, epochs), train(retain, seed + RETRAINED_SEED_OFFSET, epochs)
    level = lambda params, ids: measured_level(task(), params, Examples(data(), ids)).error
    start = level(original.params, retain)

    def add(name, params, **more):
        attacked = judge(relearned(params, forgotten, forget, seed), forgotten, seed)
        figures = {"rise": level(params, retain) - start, "forget_loss": level(params, forget)}
        again = {"UA_relearned": attacked["UA"]}
        found.append({"model": name, "forget": f"class:{forgotten}", "seed": seed} | judge(params, forgotten, seed))
        found[-1] |= figures | again | more

    add("original", original.params)
    add("retrained", retrained.params)
    copied = (
        original.params["conditions"]["embedding"]
        .at[forgotten]
        .set(original.params["conditions"]["embedding"][(forgotten + 1) % CLASSES])
    )
    add("copied row", original.params | {"conditions": {"embedding": copied}})
    # Images of the class as a model treats them that is not told what they are: what forgetting should reach.
    untold = {"inputs": data()["inputs"][forget], "labels": np.full(len(forget), CLASSES, np.int32)}
    target = eupmu.unseen_level(task(), original.params, untold).error
    for name, settings in METHODS.items():
        method = name.split(",")[0]
        made = task(original.params)
        chosen = settings | ({"target": target, "allowed_error": 0.005} if method == "EUPMU" else {})
        full = default_settings(ALL_METHODS[method], made) | chosen
        sets = Examples(data(), forget), Examples(data(), retain)
        options = {"steps": STEPS, "settings": full, "seed": seed, "forget_batch": 32, "retain_batch": 96}
        result = eupmu.unlearn(method, made, original.params, *sets, probes=1, warm=True, **options)
        share = 100 * result.processor_seconds / retrained.seconds.processor
        add(name, result.params, share_of_retraining=share, target=target, settings=full)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("rows.jsonl"))
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        made_by = origin.of(__file__, "--seeds", seed)
        for row in run(seed):
            rows.append(arguments.out, row | made_by)
            print(
                {
                    name: value if isinstance(value, str) else np.round(value, 4)
                    for name, value in row.items()
                    if name != "settings"
                },
                flush=True,
            )


if __name__ == "__main__":
    main()
