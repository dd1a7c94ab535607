"""A file of your own for `eupmu unlearn`: a diffusion model of handwritten digits, which can forget a digit.

A conditional transformer (Flax NNX) on the 8 x 8 digits of scikit-learn. The model is trained on first use, in two
minutes on 2 cores.
"""

from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from sklearn.datasets import load_digits

import eupmu_jax as eupmu
from eupmu_jax.models.dit import DiT
from eupmu_jax.objectives.diffusion import cosine_schedule
from eupmu_jax.training.fitting import fit_task

pixels, labels = load_digits(return_X_y=True)
images = (pixels / 8 - 1).astype(np.float32).reshape(-1, 8, 8, 1)
order = np.random.default_rng(0).permutation(len(images))
data, held_out = ({"inputs": images[ids], "labels": labels[ids].astype(np.int32)} for ids in np.split(order, [1_500]))

graph, _ = nnx.split(DiT(10, rngs=nnx.Rngs(0)), nnx.Param)


def denoise(params, x_t, t, labels):
    return nnx.merge(graph, params)(x_t, t, labels)


def untrained(seed):
    return nnx.to_pure_dict(nnx.state(DiT(10, rngs=nnx.Rngs(seed)), nnx.Param))


def task_with(original=None):
    return eupmu.tasks.diffusion(denoise, cosine_schedule(1_000), num_conditions=10, original=original)


def train(positions, seed):
    recipe = {"epochs": 100, "batch_size": 64, "learning_rate": 2e-3, "seed": seed}
    return fit_task(task_with(), untrained(seed), eupmu.tasks.Examples(data, positions), **recipe).params


def retrain(positions):
    return train(positions, seed=1)


# The trained parameters; yours are already in a checkpoint.
saved = Path("eupmu_runs/own_model/denoiser").absolute()
with ocp.StandardCheckpointer() as checkpointer:
    if not saved.exists():
        checkpointer.save(saved, train(np.arange(1_500), seed=0))
        checkpointer.wait_until_finished()
    params = checkpointer.restore(saved, untrained(0))

# What the forget losses compare with is the original model, not the one that changes.
task = task_with(original=params)
