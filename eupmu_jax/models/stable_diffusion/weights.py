"""Loads published weights of Stable Diffusion 1.x, in the layout of diffusers, as parameters of these models."""

import os
import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from eupmu_jax.models.stable_diffusion.autoencoder import Autoencoder
from eupmu_jax.models.stable_diffusion.text_encoder import TextEncoder
from eupmu_jax.models.stable_diffusion.unet import ConditionalUNet

FILES: dict[type[nnx.Module], str] = {
    ConditionalUNet: "unet/diffusion_pytorch_model.safetensors",
    Autoencoder: "vae/diffusion_pytorch_model.safetensors",
    TextEncoder: "text_encoder/model.safetensors",
}

# From names of our tree to published ones; all others are the same in both.
_PUBLISHED = (
    (r"\b(down|up)(_blocks\.\d+)\.resize\b", r"\1\2.\1samplers.0.conv"),
    (r"\bblock\b", "transformer_blocks.0"),
    (r"\bff\.up\b", "ff.net.0.proj"),
    (r"\bff\.down\b", "ff.net.2"),
    (r"\bto_out\b", "to_out.0"),
    (r"\battention\.", ""),
    (r"^(token|position)_embedding\b", r"embeddings.\1_embedding"),
    (r"^layers\b", "encoder.layers"),
    (r"\b(kernel|scale|embedding)$", "weight"),
)

# Older names: those of the autoencoder's attention in files of 2022, and a prefix of the text encoder's.
_OLD = (
    (r"(mid_block\.attentions\.0)\.query\b", r"\1.to_q"),
    (r"(mid_block\.attentions\.0)\.key\b", r"\1.to_k"),
    (r"(mid_block\.attentions\.0)\.value\b", r"\1.to_v"),
    (r"(mid_block\.attentions\.0)\.proj_attn\b", r"\1.to_out.0"),
    (r"^text_model\.", ""),
)
# The numbers 0, 1, ..., 76, which are not a parameter.
_IGNORED = "embeddings.position_ids"
_SHOWN = 3


def load(folder: str | os.PathLike[str], model: nnx.Module) -> chex.ArrayTree:
    """Reads the published weights of one model.

    The names and shapes of all tensors are checked before any is read, and each is used exactly once. Kernels are
    transposed to channels last, and 1x1 convolutions become dense layers.

    Args:
      folder: A folder with subfolders `unet`, `vae` and `text_encoder`, which hold the files of `FILES`.
      model: A `ConditionalUNet`, `Autoencoder` or `TextEncoder` with the architecture of the weights; its own
        parameters are not read, so it may come from `nnx.eval_shape`.

    Returns:
      Parameters as from `nnx.to_pure_dict(nnx.state(model, nnx.Param))`, in float32 whatever the dtype in the file.

    Raises:
      ImportError: If `safetensors` is not installed.
      FileNotFoundError: If the file is missing.
      TypeError: If the model is of another class.
      ValueError: If the file is damaged, or tensors are missing, left over, or of other shapes; the first few of each
        are named.

    >>> from eupmu_jax.models.stable_diffusion.text_encoder import TINY as tiny
    >>> load("nowhere", nnx.eval_shape(lambda: TextEncoder(tiny, rngs=nnx.Rngs(0))))
    Traceback (most recent call last):
    FileNotFoundError: folder: got nowhere, expected it to have text_encoder/model.safetensors
    """
    if type(model) not in FILES:
        expected = ", ".join(kind.__name__ for kind in FILES)
        raise TypeError(f"model: got {type(model).__name__}, expected one of {expected}")
    file = FILES[type(model)]
    path = Path(folder) / file
    if not path.is_file():
        raise FileNotFoundError(f"folder: got {folder}, expected it to have {file}")
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ImportError("weights of Stable Diffusion need safetensors: pip install 'eupmu-jax[diffusion]'") from None

    leaves, structure = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    wanted = {published_name(path): (_is_kernel(path), leaf) for path, leaf in leaves}
    try:
        opened = safe_open(path, framework="np")
    except SafetensorError as error:
        raise ValueError(
            f"{path}: got a file that cannot be read ({error}), expected a complete safetensors file"
        ) from None
    with opened as tensors:
        stored, twice = {}, []
        for name in sorted(tensors.keys()):
            settled = _renamed(name, _OLD)
            if settled in stored:
                twice.append(name)
            elif settled != _IGNORED:
                stored[settled] = name
        shapes = {name: tuple(tensors.get_slice(there).get_shape()) for name, there in stored.items()}
        _check(file, {name: _stored_shape(*entry) for name, entry in wanted.items()}, shapes, twice)
        read = [_ours(tensors.get_tensor(stored[name]), *entry) for name, entry in wanted.items()]
    return jax.tree.unflatten(structure, read)


def published_name(path: tuple) -> str:
    """The published name of the parameter at a path of `jax.tree_util`.

    >>> key = jax.tree_util.DictKey
    >>> published_name((key("up_blocks"), key(1), key("attentions"), key(0), key("block"), key("ff"), key("up"),
    ...                 key("kernel")))
    'up_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj.weight'
    """
    return _renamed(".".join(str(entry.key) for entry in path), _PUBLISHED)


def _renamed(name, rules):
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _is_kernel(path):
    return path[-1].key == "kernel"


def _stored_shape(kernel, leaf):
    """The shape of the stored tensor: PyTorch has outputs first, then inputs, then spatial axes."""
    return (*leaf.shape[:-3:-1], *leaf.shape[:-2]) if kernel else leaf.shape


def _same(wanted, found):
    """Whether shapes are equal, counting a 1x1 convolution as a dense layer."""
    return found == wanted or (len(wanted) == 2 and found == (*wanted, 1, 1))


def _ours(tensor, kernel, leaf):
    if kernel:
        tensor = tensor.transpose(*range(2, tensor.ndim), 1, 0)
    return jnp.asarray(tensor.reshape(leaf.shape), leaf.dtype)


def _check(file, wanted, found, twice):
    problems = {
        "missing": [name for name in wanted if name not in found],
        "left over": twice + [name for name in found if name not in wanted],
        "of another shape": [
            f"{name}: got {found[name]}, expected {shape}"
            for name, shape in wanted.items()
            if name in found and not _same(shape, found[name])
        ],
    }
    told = [
        f"{len(names)} {kind} ({', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''})"
        for kind, names in problems.items()
        if names
    ]
    if told:
        raise ValueError(
            f"{file}: got other tensors, expected exactly the {len(wanted)} of the model: {'; '.join(told)}"
        )
