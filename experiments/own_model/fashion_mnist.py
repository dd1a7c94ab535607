"""A file of your own for `eupmu unlearn`, with Flax NNX and Orbax: a small convnet on images of clothes.

It needs Debian's package dataset-fashion-mnist. The model is trained on first use, in half a minute; the arrays and the
parameters are kept in eupmu_runs/own_model.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx

import eupmu_jax as eupmu
from eupmu_jax.data import load

folder = Path("eupmu_runs/own_model")
if not (arrays := folder / "fashion_mnist.npz").exists():
    folder.mkdir(parents=True, exist_ok=True)
    images = load("fashion_mnist", seed=0)
    chosen = np.random.default_rng(0).permutation(len(images.train_labels))[:12_000]
    np.savez(arrays, inputs=images.train_images[chosen], labels=images.train_labels[chosen])
with np.load(arrays) as found:
    everything = dict(found)
data = {name: array[:10_000] for name, array in everything.items()}
held_out = {name: array[10_000:] for name, array in everything.items()}


class Convnet(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Conv(1, 16, (3, 3), strides=2, rngs=rngs)
        self.second = nnx.Conv(16, 32, (3, 3), strides=2, rngs=rngs)
        self.hidden = nnx.Linear(32 * 7 * 7, 128, rngs=rngs)
        self.out = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.second(nnx.relu(self.first(x))))
        return self.out(nnx.relu(self.hidden(x.reshape(len(x), -1))))


# The model as a function of its parameters; `rest` would hold BatchNorm statistics.
model = Convnet(nnx.Rngs(0))
model.eval()
graph, _, rest = nnx.split(model, nnx.Param, ...)


def apply(params, inputs):
    return nnx.merge(graph, params, rest)(inputs)


task = eupmu.tasks.classification(apply, num_classes=10)


def train(positions, seed, epochs=25, batch=128):
    params = nnx.to_pure_dict(nnx.state(Convnet(nnx.Rngs(seed)), nnx.Param))
    optimizer, rng = optax.adam(1e-3), np.random.default_rng(seed)

    @jax.jit
    def epoch(params, state, batches):
        def step(carry, ids):
            chosen = jax.tree.map(lambda leaf: jnp.asarray(leaf)[ids], data)
            gradient = jax.grad(lambda p: task.retain(task.outputs(p, chosen, None), chosen))(carry[0])
            updates, state = optimizer.update(gradient, carry[1], carry[0])
            return (optax.apply_updates(carry[0], updates), state), None

        return jax.lax.scan(step, (params, state), batches)[0]

    state, whole = optimizer.init(params), len(positions) // batch * batch
    for _ in range(epochs):
        params, state = epoch(params, state, rng.permutation(positions)[:whole].reshape(-1, batch))
    return params


def retrain(positions):
    return train(positions, seed=1)


# The trained parameters; yours are already in a checkpoint.
saved = folder.absolute() / "fashion_mnist"
with ocp.StandardCheckpointer() as checkpointer:
    if not saved.exists():
        checkpointer.save(saved, train(np.arange(10_000), seed=0))
        checkpointer.wait_until_finished()
    params = checkpointer.restore(saved, nnx.to_pure_dict(nnx.state(Convnet(nnx.Rngs(0)), nnx.Param)))
