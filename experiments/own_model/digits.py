"""A file of your own for `eupmu unlearn`, in plain JAX: a model of handwritten digits.

Copy it and replace the data and the model. Then, with positions in ids.txt:
eupmu unlearn digits.py --forget ids.txt --out RUN --retrain && eupmu audit RUN digits.py
"""

from pathlib import Path

import jax
import numpy as np
import optax
from sklearn.datasets import load_digits

import eupmu_jax as eupmu

pixels, digits = load_digits(return_X_y=True)
everything = {"inputs": (pixels / 16).astype(np.float32), "labels": digits.astype(np.int32)}
order = np.random.default_rng(0).permutation(len(digits))
data, held_out = ({name: array[ids] for name, array in everything.items()} for ids in np.split(order, [1_400]))


def initial(key):
    keys = jax.random.split(key)
    return {"hidden": jax.random.normal(keys[0], (64, 256)) / 8, "out": jax.random.normal(keys[1], (256, 10)) / 16}


def apply(params, inputs):
    return jax.nn.relu(inputs @ params["hidden"]) @ params["out"]


task = eupmu.tasks.classification(apply, num_classes=10)


def train(positions, seed):
    optimizer, known = optax.adam(1e-3), {name: array[positions] for name, array in data.items()}

    def step(carry, key):
        params, state = carry
        batch = jax.tree.map(lambda leaf: jax.random.choice(key, leaf, (64,)), known)
        gradient = jax.grad(lambda p: task.retain(task.outputs(p, batch, key), batch))(params)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    params = initial(jax.random.key(seed))
    return jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(jax.random.key(seed), 3_000))[0][0]


def retrain(positions):
    return train(positions, seed=1)


# The trained parameters; yours are already in a file.
saved = Path("eupmu_runs/own_model/digits.npz")
if not saved.exists():
    saved.parent.mkdir(parents=True, exist_ok=True)
    np.savez(saved, **train(np.arange(1_400), seed=0))
with np.load(saved) as found:
    params = dict(found)
