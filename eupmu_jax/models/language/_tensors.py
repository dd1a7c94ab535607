"""Builds a model from the tensors of a checkpoint, under their Hugging Face names."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from eupmu_jax._stack.checks import check_same_shapes
from eupmu_jax._stack.programs import fetched
from eupmu_jax.models.language._families import Settings, model_of
from eupmu_jax.models.language.adapter import LanguageModel, from_parts


class Tensors(NamedTuple):
    """A checkpoint of which only the index has been read.

    Attributes:
      where: Name of its file in errors.
      shapes: Shapes by the names of the tensors.
      read: Reads one tensor by its name.
    """

    where: str
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]


_EMBEDDING, _OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
# From the end of a parameter's path to its tensors, one or several to be stacked.
_SELF = "self_attn.{}_proj.weight"
_NAMES = {
    "embedder.input_embedding": [_EMBEDDING],
    "final_norm.w": ["model.norm.weight"],
    "final_norm.scale": ["model.norm.weight"],
    "lm_head.w": [_OUTPUT],
    **{f"attn.{part}_proj.w": [_SELF.format(part)] for part in "qkvo"},
    **{f"attn.{part}_bias": [f"self_attn.{part}_proj.bias"] for part in "qkv"},
    "attn.attn_vec_einsum.w": [_SELF.format("o")],
    "attn.q_einsum.w": [_SELF.format("q")],
    "attn.kv_einsum.w": [_SELF.format("k"), _SELF.format("v")],
    "attn.qkv_einsum.w": [_SELF.format("q"), _SELF.format("k"), _SELF.format("v")],
    "attn.q_norm.w": ["self_attn.q_norm.weight"],
    "attn.k_norm.w": ["self_attn.k_norm.weight"],
    "attn._query_norm.scale": ["self_attn.q_norm.weight"],
    "attn._key_norm.scale": ["self_attn.k_norm.weight"],
    **{f"mlp.{part}_proj.kernel": [f"mlp.{part}_proj.weight"] for part in ("gate", "up", "down")},
    "input_layernorm.w": ["input_layernorm.weight"],
    "pre_attention_norm.scale": ["input_layernorm.weight"],
    "post_attention_layernorm.w": ["post_attention_layernorm.weight"],
    "post_attn_norm.scale": ["post_attention_layernorm.weight"],
    "post_attention_norm.scale": ["post_attention_layernorm.weight"],
    "pre_ffw_norm.scale": ["pre_feedforward_layernorm.weight"],
    "post_ffw_norm.scale": ["post_feedforward_layernorm.weight"],
}
# The first Gemma has one norm fewer around each part, and Llama's name for the one before the MLP.
_FIRST_GEMMA = {"pre_ffw_norm.scale": ["post_attention_layernorm.weight"]}


def build(
    config: Mapping[str, Any],
    tensors: Tensors,
    dtype: jax.typing.DTypeLike,
    shardings: Callable | None = None,
    remat: bool = False,
) -> LanguageModel:
    """The model of a checkpoint; each tensor is placed by `shardings` as it is read.

    Raises:
      ImportError: Without google-tunix.
      ValueError: If the dtype is not floating point, google-tunix does not support the configuration, or tensors are
        missing, left over or of other shapes; raised before anything is read.
    """
    try:
        is_floating = jnp.issubdtype(dtype, jnp.floating)
    except TypeError:
        is_floating = False
    if not is_floating:
        raise ValueError(f"dtype: got {dtype!r}, expected a floating-point dtype such as 'bfloat16'")
    model, leaves, rest, _ = _planned(config, tensors, jnp.dtype(dtype), remat)
    shapes = _shapes(model)
    places = [None] * len(leaves)
    if shardings is not None:
        places = jax.tree.leaves(shardings(shapes))
        if len(places) != len(leaves):
            raise ValueError(f"shardings: got {len(places)}, expected one for each of {len(leaves)} parameters")
    read = [leaf.read(tensors, place) for leaf, place in zip(leaves, places, strict=True)]
    params = jax.tree.unflatten(jax.tree.structure(shapes), read)
    return from_parts(nnx.graphdef(model), params, (rest,), model.config, config.get("max_position_embeddings"))


def with_values(tensors: Tensors, config: Mapping[str, Any], params: chex.ArrayTree) -> Tensors:
    """The tensors of a checkpoint with the values of other parameters, the inverse of `build`.

    Raises:
      ImportError, ValueError: As in `build`, and for parameters that are not like those of the model.
    """
    model, leaves, _, tied = _planned(config, tensors, jnp.dtype(jnp.float32), remat=False)
    check_same_shapes("params", params, "the model's", _shapes(model))
    found = {
        name: (leaf, value, index)
        for leaf, value in zip(leaves, jax.tree.leaves(params), strict=True)
        for index, name in enumerate(leaf.names)
    }

    def read(name):
        # What is no parameter is a buffer, or the embedding once more.
        name = _EMBEDDING if tied and name == _OUTPUT else name
        if name not in found:
            return np.asarray(tensors.read(name))
        leaf, value, index = found[name]
        return leaf.written(value, index)

    return tensors._replace(read=read)


def _planned(config, tensors, dtype, remat):
    """The model of a checkpoint without values, its parameters, its other variables, and whether its output is tied."""
    try:
        import tunix  # noqa: F401
    except ImportError as error:
        raise ImportError("language models need google-tunix: pip install 'eupmu-jax[language]'") from error
    settings = Settings(config, tensors.where)
    tied = settings.get("tie_word_embeddings", _OUTPUT not in tensors.shapes)
    model = nnx.eval_shape(lambda: model_of(settings, tied, dtype, remat))
    # Everything that is not a parameter is a bias that the architecture lacks.
    rest = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), nnx.state(model, nnx.Not(nnx.Param)))
    paths = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    leaves = [_Leaf.of(path, leaf, config["model_type"]) for path, leaf in paths]
    _check(tensors, leaves, tied)
    return model, leaves, rest, tied


def _shapes(model):
    return jax.tree.map(_struct, nnx.to_pure_dict(nnx.state(model, nnx.Param)))


def _struct(leaf):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


class _Leaf(NamedTuple):
    """A parameter: the names of its tensors, its shape and dtype, and the module that determines its axes."""

    names: list[str]
    shape: tuple[int, ...]
    dtype: Any
    module: str

    @classmethod
    def of(cls, path, leaf, family):
        *_, last, name = keys = [str(entry.key) for entry in path]
        found = {**_NAMES, **(_FIRST_GEMMA if family == "gemma" else {})}
        if keys[0] == "layers":
            names = [f"model.layers.{keys[1]}.{tensor}" for tensor in found[".".join(keys[2:])]]
        else:
            names = found[".".join(keys)]
        return cls(names, leaf.shape, leaf.dtype, last if name == "w" else name)

    def tensor_shape(self):
        """The shape of one of its tensors: PyTorch has outputs first, and heads and their features as one axis."""
        if len(self.shape) == 1 or self.module == "input_embedding":
            return self.shape
        if self.module in ("o_proj", "attn_vec_einsum"):
            heads, size, width = self.shape
            return width, heads * size
        if self.module in ("q_einsum", "kv_einsum", "qkv_einsum"):
            heads, width, size = self.shape[-3:]
            return heads * size, width
        width, *outputs = self.shape
        return int(np.prod(outputs)), width

    def read(self, tensors, place):
        parts = [np.asarray(tensors.read(name)) for name in self.names]
        if self.module in ("q_einsum", "kv_einsum", "qkv_einsum"):
            heads, width, size = self.shape[-3:]
            parts = [part.reshape(heads, size, width).swapaxes(1, 2) for part in parts]
        elif len(self.shape) > 1 and self.module != "input_embedding":
            parts = [part.T for part in parts]
        value = np.stack(parts) if len(parts) > 1 else parts[0]
        # Kept on the host until here, so that no device holds more than its part.
        value = np.asarray(value).reshape(self.shape).astype(self.dtype, copy=False)
        return jnp.asarray(value) if place is None else jax.device_put(value, place)

    def written(self, value, index):
        value = fetched(value)
        value = value[index] if len(self.names) > 1 else value
        if self.module in ("q_einsum", "kv_einsum", "qkv_einsum"):
            value = value.swapaxes(1, 2)
        elif len(self.shape) > 1 and self.module != "input_embedding":
            value = value.reshape(self.tensor_shape()[::-1]).T
        return np.ascontiguousarray(value.reshape(self.tensor_shape()))


def _check(tensors, leaves, tied):
    wanted = {name: leaf.tensor_shape() for leaf in leaves for name in leaf.names}
    # Buffers in old files, and an output layer that some files store although it is tied to the embedding.
    needless = re.compile(r".*rotary_emb\.inv_freq" + (r"|lm_head\.weight" if tied else ""))
    missing = [name for name in wanted if name not in tensors.shapes]
    others = [name for name in tensors.shapes if name not in wanted and not needless.fullmatch(name)]
    for words, names in (("no tensor", missing), ("a tensor that the architecture lacks,", others)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"{tensors.where}: got {words} {names[0]}{more}, expected those of the architecture")
    for name, shape in wanted.items():
        if tuple(tensors.shapes[name]) != shape:
            raise ValueError(f"{tensors.where}: got {name} of shape {tuple(tensors.shapes[name])}, expected {shape}")
