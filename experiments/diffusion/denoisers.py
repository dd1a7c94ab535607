"""What `large.py` runs: two networks as shapes, a task on a mesh, and captions as its conditions."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from eupmu_jax import tasks
from eupmu_jax.commands.plan_models import BLOCKS, GROUPS, LATENT, WIDTHS
from eupmu_jax.models import stable_diffusion as sd
from eupmu_jax.models.unet import UNet
from eupmu_jax.objectives.diffusion import Schedule, linear_schedule

CIFAR10, CLASSES, IMAGE = "cifar10", 10, (32, 32, 3)
DDPM = {"in_channels": 3, "patch_size": 1, "widths": WIDTHS, "blocks": BLOCKS, "groups": GROUPS}
UNET, TEXT = sd.UNetConfig(), sd.TextEncoderConfig()
# Texts embedded at a time.
TEXTS = 64


class Denoiser(NamedTuple):
    """A network without parameter values, and what it generates.

    Attributes:
      model: The result of `nnx.eval_shape`.
      shape: Shape of an image.
      schedule: The noise schedule; the network predicts the noise.
      bounded: Whether images lie in [-1, 1].
    """

    model: nnx.Module
    shape: tuple[int, ...]
    schedule: Schedule
    bounded: bool

    @property
    def params(self) -> Any:
        """The shapes of the parameters."""
        return nnx.to_pure_dict(nnx.state(self.model, nnx.Param))


def unet(seed: Any) -> UNet:
    """The U-Net of CIFAR-10, with fresh parameters."""
    return UNet(CLASSES, **DDPM, rngs=nnx.Rngs(seed))


def denoiser(model: str) -> Denoiser:
    """The network of that name."""
    if model == CIFAR10:
        made = nnx.eval_shape(lambda: unet(0))
        return Denoiser(made, IMAGE, linear_schedule(), True)
    made = nnx.eval_shape(lambda: sd.ConditionalUNet(UNET, rngs=nnx.Rngs(0)))
    return Denoiser(made, LATENT, sd.published_schedule(), False)


def task_of(made: Denoiser, mesh: Mesh, batch: int, original=None, table=None) -> tasks.Task:
    """The task on a mesh; conditions are the rows of `table`, the last for no condition, or classes if it is None."""
    graph, share = nnx.graphdef(made.model), mesh.shape["data"]
    by_example = NamedSharding(mesh, PartitionSpec("data"))

    def of_part(params, x_t, t, labels):
        x_t, t, labels = jax.lax.with_sharding_constraint((x_t, t, labels), by_example)
        low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
        conditions = labels if table is None else table[labels].astype(jnp.bfloat16)
        return nnx.merge(graph, low)(x_t.astype(jnp.bfloat16), t, conditions).astype(x_t.dtype)

    def denoise(params, x_t, t, labels):
        count = len(x_t)
        if count == batch:
            return of_part(params, x_t, t, labels)
        # Measurements outside the steps: in parts no larger than a step's batch, split evenly over the devices.
        size = min(batch, count + -count % share)
        fill = lambda leaf: jnp.pad(leaf, [(0, -count % size)] + [(0, 0)] * (leaf.ndim - 1))
        parts = jax.tree.map(lambda leaf: fill(leaf).reshape(-1, size, *leaf.shape[1:]), (x_t, t, labels))
        found = jax.lax.map(jax.checkpoint(lambda part: of_part(params, *part)), parts)
        return found.reshape(-1, *x_t.shape[1:])[:count]

    conditions = CLASSES if table is None else len(table) - 1
    options = {"prediction": "epsilon", "num_conditions": conditions, "original": original, "bounded": made.bounded}
    return tasks.diffusion(denoise, made.schedule, **options)


def captioned(weights: Path, forget: Path, retain: Path) -> tuple[dict, dict, np.ndarray]:
    """Both sets, and the embedded captions that their labels index; the empty text is last."""
    found = []
    for name, path in (("forget", forget), ("retain", retain)):
        with np.load(path) as arrays:
            if not {"latents", "tokens"} <= set(arrays) or arrays["tokens"].shape[1:] != (TEXT.length,):
                shapes = {key: arrays[key].shape for key in arrays}
                raise ValueError(f"{name}: got {shapes}, expected latents and tokens (n, {TEXT.length})")
            found.append({"inputs": arrays["latents"].astype(np.float32), "tokens": arrays["tokens"]})
    # The last two tokens of the vocabulary: the start of a text, and its end, which also pads.
    nothing = np.array([TEXT.vocab - 2] + [TEXT.vocab - 1] * (TEXT.length - 1))
    every = np.unique(np.concatenate([part["tokens"] for part in found]), axis=0)
    every = np.vstack([every[(every != nothing).any(1)], nothing])
    numbers = {row.tobytes(): k for k, row in enumerate(every)}
    of = lambda tokens: np.array([numbers[row.astype(every.dtype).tobytes()] for row in tokens], np.int32)
    encoder = nnx.eval_shape(lambda: sd.TextEncoder(TEXT, rngs=nnx.Rngs(0)))
    params, graph = sd.load(weights, encoder), nnx.graphdef(encoder)
    encode = jax.jit(lambda params, tokens: nnx.merge(graph, params)(tokens))
    table = np.concatenate([encode(params, every[i : i + TEXTS]) for i in range(0, len(every), TEXTS)])
    first, second = ({"inputs": part["inputs"], "labels": of(part["tokens"])} for part in found)
    return first, second, table
