"""The models that `eupmu plan` can compile a step for: decoders of several sizes and two image denoisers."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from eupmu_jax.models.decoder import SIZES, Decoder, decoder_shardings
from eupmu_jax.models.stable_diffusion import ConditionalUNet, TextEncoderConfig, UNetConfig
from eupmu_jax.models.unet import UNet
from eupmu_jax.objectives.diffusion import squared_errors
from eupmu_jax.sharding import param_shardings

DDPM = "ddpm-cifar10"
STABLE_DIFFUSION = "stable-diffusion"
MODELS = (*SIZES, DDPM, STABLE_DIFFUSION)
# A denoiser of 32 x 32 images like that of Ho et al. 2020, appendix B, with 26.9 instead of 35.7 million parameters:
# theirs also has attention at 16 x 16, one more block per level on the way up, and two blocks below the lowest level.
WIDTHS, BLOCKS, GROUPS = (128, 256, 256, 256), 2, 32
# A sixteenth of what a compiler can count, as several arrays of that size are counted together.
MOST_BYTES = 2**59
# Latents of images of 512 x 512 pixels.
LATENT = (64, 64, UNetConfig().channels)


class Planned(NamedTuple):
    """A model to be compiled; only shapes, nothing is in memory.

    Attributes:
      params: Shapes of the parameters, in float32; the loss computes in bfloat16.
      shardings: Shardings of the parameters on the mesh.
      loss: `loss(params, batch, fixed) -> scalar`.
      batch: Shapes of a batch.
      examples: What a batch consists of, in words.
      fixed: Shapes of the arrays that are not trained, with their shardings.
    """

    params: chex.ArrayTree
    shardings: chex.ArrayTree
    loss: Callable
    batch: chex.ArrayTree
    examples: str
    fixed: chex.ArrayTree = ()


def planned(model: str, mesh: Mesh, batch: int, sequence: int, adapters: int = 0) -> Planned:
    """The named model.

    A denoiser's batch contains its targets. Targets of `tasks.diffusion` with `original`, such as negative guidance,
    take two more forward passes and a second tree of parameters, which the plan leaves out.

    Args:
      model: One of `MODELS`.
      mesh: A mesh with axes `data` and `model`.
      batch: Sequences or images in a batch.
      sequence: Tokens per sequence.
      adapters: Rank of the low-rank adapters that are a decoder's only parameters, all else fixed; 0 for none.

    Raises:
      ValueError: For an unknown model, adapters for a model that is not a decoder, a mesh that does not fit the model
        or the batch, or sequences whose attention scores are more than a compiler can count.
    """
    if model not in MODELS:
        raise ValueError(f"model: got {model!r}, expected one of {', '.join(MODELS)}")
    data, tensor = mesh.shape["data"], mesh.shape["model"]
    if model in SIZES:
        return _decoder(model, mesh, batch, sequence, adapters)
    if adapters:
        raise ValueError(f"adapters: got {adapters} for {model}, expected 0: only decoders have them")
    if batch % data:
        raise ValueError(f"batch: got {batch} on a mesh of data {data} x tensor {tensor}, expected a multiple of data")
    return (_ddpm if model == DDPM else _stable_diffusion)(mesh, batch)


def _decoder(model, mesh, batch, sequence, adapters):
    size, data, tensor = SIZES[model]._replace(adapters=adapters), mesh.shape["data"], mesh.shape["model"]
    if size.kv_heads % tensor or size.width % (data * tensor) or batch % data:
        raise ValueError(
            f"tensor, batch: got a mesh of data {data} x tensor {tensor} and batch {batch}; expected tensor to divide "
            f"the {size.kv_heads} key and value heads, data to divide the batch, and both the width {size.width}"
        )
    if (scores := 8 * batch * size.heads * sequence**2) > MOST_BYTES:
        raise ValueError(
            f"batch, sequence: got {batch} and {sequence}, whose attention scores take {scores:.1e} bytes; expected at "
            f"most {MOST_BYTES:.1e}, as more overflows in the compiler"
        )
    activations = NamedSharding(mesh, PartitionSpec("data"))
    abstract = nnx.eval_shape(lambda: Decoder(size, jnp.bfloat16, activations=activations, rngs=nnx.Rngs(0)))
    graph, *parts = nnx.split(abstract, nnx.LoRAParam if adapters else nnx.Param, nnx.Param)
    params, fixed = (nnx.to_pure_dict(part) for part in parts)
    fixed = jax.tree.map(
        lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=at),
        fixed,
        decoder_shardings(fixed, mesh),
    )

    def loss(params, batch, fixed):
        logits = nnx.merge(graph, params, fixed)(batch["tokens"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()

    tokens = jax.ShapeDtypeStruct((batch, sequence), jnp.int32)
    shapes = {"tokens": tokens, "labels": tokens}
    return Planned(params, decoder_shardings(params, mesh), loss, shapes, f"sequences of {sequence:,} tokens", fixed)


def _ddpm(mesh, batch):
    sizes: dict[str, Any] = {"in_channels": 3, "patch_size": 1, "widths": WIDTHS, "blocks": BLOCKS, "groups": GROUPS}
    abstract = nnx.eval_shape(lambda: UNet(10, **sizes, rngs=nnx.Rngs(0)))
    conditions = jax.ShapeDtypeStruct((batch,), jnp.int32)
    return _denoiser(abstract, mesh, (batch, 32, 32, 3), conditions, "images of 32 x 32 pixels")


def _stable_diffusion(mesh, batch):
    abstract = nnx.eval_shape(lambda: ConditionalUNet(rngs=nnx.Rngs(0)))
    text = jax.ShapeDtypeStruct((batch, TextEncoderConfig().length, UNetConfig().context), jnp.bfloat16)
    return _denoiser(abstract, mesh, (batch, *LATENT), text, "latent images of 512 x 512 pixels")


def _denoiser(abstract, mesh, shape, conditions, examples):
    graph, parameters = nnx.split(abstract, nnx.Param)
    params = nnx.to_pure_dict(parameters)

    def loss(params, batch, fixed):
        del fixed
        low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
        predicted = nnx.merge(graph, low)(batch["x_t"], batch["t"], batch["conditions"])
        return jnp.mean(squared_errors(predicted.astype(jnp.float32), batch["target"]))

    shapes = {
        "x_t": jax.ShapeDtypeStruct(shape, jnp.bfloat16),
        "t": jax.ShapeDtypeStruct(shape[:1], jnp.int32),
        "target": jax.ShapeDtypeStruct(shape, jnp.float32),
        "conditions": conditions,
    }
    return Planned(params, param_shardings(params, mesh, axes=("data", "model")), loss, shapes, examples)
