"""A file of your own for `eupmu unlearn`, on a mesh: a small decoder that has memorised dictionary entries.

It needs Debian's package dict-devil. The mesh uses all devices; the same file runs on a single one. The model is
trained on first use, in two minutes on 2 cores. To try eight devices on one CPU, set
XLA_FLAGS=--xla_force_host_platform_device_count=8.
"""

from pathlib import Path

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx

import eupmu_jax as eupmu
from eupmu_jax import sharding
from eupmu_jax.data import passages
from eupmu_jax.models.decoder import SIZES, Decoder

tokens = passages.load(64)
order = np.random.default_rng(0).permutation(len(tokens))
data, held_out = ({"tokens": tokens[ids]} for ids in np.split(order, [776]))

# Examples are split along the first axis of the mesh, large parameters along the second.
devices = len(jax.devices())
mesh = sharding.make_mesh(data=devices // 2, model=2) if devices % 2 == 0 else None

size = SIZES["tiny"]._replace(vocab=passages.VOCABULARY)
graph, _ = nnx.split(Decoder(size, rngs=nnx.Rngs(0)), nnx.Param)


def apply(params, tokens):
    return nnx.merge(graph, params)(tokens)


task = eupmu.tasks.language(apply)


def train(positions, seed, epochs=80, batch=32):
    params = nnx.to_pure_dict(nnx.state(Decoder(size, rngs=nnx.Rngs(seed)), nnx.Param))
    optimizer, rng = optax.adam(3e-3), np.random.default_rng(seed)

    @jax.jit
    def step(params, state, chosen):
        gradient = jax.grad(lambda p: task.retain(task.outputs(p, chosen, None), chosen))(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(epochs):
        for ids in rng.permutation(positions)[: len(positions) // batch * batch].reshape(-1, batch):
            params, state = step(params, state, {"tokens": data["tokens"][ids]})
    return params


def retrain(positions):
    return train(positions, seed=1)


# The trained parameters; yours are already in a checkpoint.
saved = Path("eupmu_runs/own_model/decoder").absolute()
with ocp.StandardCheckpointer() as checkpointer:
    if not saved.exists():
        checkpointer.save(saved, train(np.arange(776), seed=0))
        checkpointer.wait_until_finished()
    params = checkpointer.restore(saved, nnx.to_pure_dict(nnx.state(Decoder(size, rngs=nnx.Rngs(0)), nnx.Param)))
