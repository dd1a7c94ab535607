"""Language models from folders in the Hugging Face format."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp

from eupmu_jax.models.language._tensors import Tensors, build, with_values
from eupmu_jax.models.language.adapter import LanguageModel
from eupmu_jax.models.language.tokenizer import Tokenizer, check_template

# Of tensors, as safetensors names them; others hold quantised numbers, which mean nothing without their scales.
_FLOATS = ("F64", "F32", "F16", "BF16")
# Files beside the weights: configurations, the tokenizer, the index of the weights.
_BESIDE = (".json", ".jinja", ".model", ".txt")


def load_huggingface(
    folder: str | os.PathLike[str],
    dtype: jax.typing.DTypeLike = jnp.float32,
    *,
    shardings: Callable[[chex.ArrayTree], chex.ArrayTree] | None = None,
    remat: bool = False,
) -> LanguageModel:
    """Reads config.json and the weights in *.safetensors; nothing is downloaded, and PyTorch is not needed.

    Supported architectures are the dense llama (Llama 2 to 3.2 and SmolLM2), qwen2, qwen3, gemma, gemma2 and
    gemma3_text. Settings that google-tunix would silently compute differently are rejected: other activations, sliding
    windows of Qwen, and scaled rotary positions other than those of Llama 3.1 and later. A Qwen 3 whose `rope_theta` is
    not 1,000,000 is rejected too, as google-tunix hard-codes that number.

    Args:
      folder: A folder written by `save_pretrained`, or downloaded from the Hub.
      dtype: Dtype of parameters and computation.
      shardings: Function from the shapes of all parameters to a tree of shardings. Each parameter is placed as it is
        read, so that no device holds more than its part. For example `lambda shapes: sharding.param_shardings(shapes,
        mesh, axes=("data", "model"))` splits them over all devices of a mesh. Without it the first device holds all.
      remat: Whether to recompute each block in the backward pass, so that only the inputs of blocks are kept.

    Raises:
      FileNotFoundError: If config.json or the weights are missing.
      ImportError: Without the extra `language`.
      ValueError: For an unsupported architecture or setting, a dtype that is not floating point, tensors that are
        missing, left over, of other shapes or in two files, and a damaged or quantised file, which is named. It is
        raised before any tensor is read.

    >>> load_huggingface("nowhere")
    Traceback (most recent call last):
    FileNotFoundError: folder: got nowhere without config.json and *.safetensors, expected what save_pretrained writes
    """
    config, _, tensors = _checkpoint("folder", Path(folder))
    return build(config, tensors, dtype, shardings, remat)


def save_huggingface(params: chex.ArrayTree, source: str | os.PathLike[str], folder: str | os.PathLike[str]) -> None:
    """Writes parameters in the Hugging Face format, for transformers and whatever else reads it.

    Configuration, tokenizer and the division into files are those of the folder that the parameters came from. Tensors
    have the dtype of the parameters, and config.json says so. One file at a time is held in memory.

    Args:
      params: Parameters of `load_huggingface(source)`, unlearned or trained; of a model with adapters, those of
        `merge_lora`. They may lie on several devices of this process.
      source: The folder that they were loaded from.
      folder: A new or empty folder.

    Raises:
      FileExistsError: If the folder holds anything, or is a file.
      FileNotFoundError: If config.json or the weights of `source` are missing.
      ImportError: Without the extra `language`.
      ValueError: For parameters of another model or of several dtypes, and where `load_huggingface` refuses `source`;
        raised before anything is written.

    >>> save_huggingface({}, "nowhere", "unlearned")
    Traceback (most recent call last):
    FileNotFoundError: source: got nowhere without config.json and *.safetensors, expected what save_pretrained writes
    """
    source, folder = Path(source), Path(folder)
    config, files, tensors = _checkpoint("source", source)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"folder: got {folder}, which is not empty, expected a new folder")
    tensors = with_values(tensors, config, params)
    dtypes = sorted({str(leaf.dtype) for leaf in jax.tree.leaves(params)})
    if len(dtypes) > 1:
        raise ValueError(f"params: got {', '.join(dtypes)}, expected a single dtype")
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    size = 0
    for path, names in files.items():
        written = {name: tensors.read(name) for name in names}
        # transformers refuses files that do not name a framework it knows.
        save_file(written, folder / path.name, {"format": "pt"})
        size += sum(tensor.nbytes for tensor in written.values())
        # Before the next file is read.
        del written
    for path in source.iterdir():
        if path.suffix in _BESIDE and path.name != "config.json" and not path.name.endswith(".bin.index.json"):
            # Without the permissions of the source, which may be read-only.
            shutil.copyfile(path, folder / path.name)
    if (path := folder / "model.safetensors.index.json").exists():
        index = _entries(path)
        index["metadata"] = (index.get("metadata") or {}) | {"total_size": size}
        path.write_text(json.dumps(index, indent=2))
    # Last, so that nobody loads a folder that is not complete.
    config |= dict.fromkeys([name for name in ("dtype", "torch_dtype") if name in config] or ["dtype"], dtypes[0])
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def huggingface_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer:
    """Reads tokenizer.json, and from tokenizer_config.json the special tokens and the token that ends an answer.

    The chat template comes from chat_template.jinja, or else from tokenizer_config.json, where older versions put it.
    If it does not write the end token of tokenizer_config.json, but another that generation_config.json lists, that one
    ends an answer: Gemma's `<end_of_turn>`. All others listed there are `stops`.

    Args:
      folder: As for `load_huggingface`.

    Raises:
      FileNotFoundError: If one of the files is missing.
      ImportError: Without the extra `language`.
      ValueError: If no token that ends an answer is named, or the tokenizer does not have it; if the chat template
        writes some special tokens that the tokenizer has and some that it lacks, such as `<|im_start|>`; or for a
        damaged file, which is named.

    >>> huggingface_tokenizer("nowhere")
    Traceback (most recent call last):
    FileNotFoundError: folder: got nowhere without tokenizer.json, expected what save_pretrained writes
    """
    folder = Path(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (folder / name).exists():
            raise FileNotFoundError(f"folder: got {folder} without {name}, expected what save_pretrained writes")
    try:
        from tokenizers import Tokenizer as Fast
    except ImportError as error:
        raise ImportError("tokenizers are needed: pip install 'eupmu-jax[language]'") from error
    config = _entries(folder / "tokenizer_config.json")
    # Other entries with such names, like add_bos_token, are flags.
    named = {name: token for name, token in config.items() if name.endswith("_token") and token not in (None, "")}
    named = {name: token for name, token in named.items() if not isinstance(token, bool)}
    special = {name: token["content"] if isinstance(token, dict) else token for name, token in named.items()}
    if wrong := [name for name, token in special.items() if not isinstance(token, str)]:
        raise ValueError(f"{folder}: got {special[wrong[0]]!r} as {wrong[0]}, expected one token")
    end = special.get("eos_token")
    # The package has no exception class of its own.
    fast = _read(folder / "tokenizer.json", lambda file: Fast.from_file(str(file)), Exception)
    # Padding and truncation settings of the file are ignored.
    fast.no_padding()
    fast.no_truncation()
    if end is None or fast.token_to_id(end) is None:
        raise ValueError(f"{folder}: got {end!r} as the token that ends an answer, expected a token of the tokenizer")
    template = config.get("chat_template")
    if isinstance(template, list):
        template = next((one["template"] for one in template if one["name"] == "default"), None)
    if (folder / "chat_template.jinja").exists():
        template = (folder / "chat_template.jinja").read_text()
    check_template(str(folder), template, fast.get_vocab())
    listed = _ends(folder, fast)
    number = fast.token_to_id(_end_of_turn(listed.values(), template or "", end))
    stops = tuple(other for other in listed if other != number)
    return Tokenizer(fast, number, template, fast.get_vocab_size(), special, stops)


def _ends(folder, fast):
    """The tokens that generation_config.json lists as ends, by their numbers."""
    path = folder / "generation_config.json"
    ids = _entries(path).get("eos_token_id") if path.exists() else None
    known = [number for number in (ids if isinstance(ids, list) else [ids]) if isinstance(number, int) and number >= 0]
    return {number: token for number in known if (token := fast.id_to_token(number))}


def _end_of_turn(listed, template, end):
    """The token with which the chat template ends a turn, if `end` is not it: Gemma's `<eos>` only ends a text."""
    if end in template or "eos_token" in template:
        return end
    return next((token for token in listed if token in template), end)


def _checkpoint(argument, folder):
    """The configuration of a checkpoint, the names of its tensors in each file, and the tensors, to be read."""
    files = sorted(folder.glob("*.safetensors"))
    found = {"config.json": (folder / "config.json").exists(), "*.safetensors": bool(files)}
    if missing := " and ".join(name for name in found if not found[name]):
        raise FileNotFoundError(f"{argument}: got {folder} without {missing}, expected what save_pretrained writes")
    config = _entries(folder / "config.json")
    if config.get("quantization_config"):
        raise ValueError(f"{folder}: got quantised weights, expected those of a model in floating point")
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError("language models need safetensors: pip install 'eupmu-jax[language]'") from error
    # NumPy slices do not support bfloat16; those of Flax are JAX arrays of any dtype.
    opened = [_read(file, lambda file: safe_open(file, framework="flax"), SafetensorError) for file in files]
    owner: dict[str, Any] = {}
    names = {path: list(file.keys()) for path, file in zip(files, opened, strict=True)}
    for path, file in zip(files, opened, strict=True):
        for name in names[path]:
            if name in owner:
                raise ValueError(
                    f"{path}: got {name}, which another file has too, expected each tensor in one file only"
                )
            owner[name] = file
    slices = {name: file.get_slice(name) for name, file in owner.items()}
    for name, part in slices.items():
        if (kind := part.get_dtype()) not in _FLOATS:
            raise ValueError(f"{folder}: got {name} in {kind}, expected weights in floating point of 16 bits or more")
    shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
    return config, names, Tensors(str(folder), shapes, lambda name: owner[name].get_tensor(name))


def _entries(path):
    """The entries of a JSON file."""
    found = _read(path, lambda path: json.loads(path.read_text()), ValueError)
    if not isinstance(found, dict):
        raise ValueError(f"{path}: got a {type(found).__name__}, expected a JSON object")
    return found


def _read(path, read, errors):
    try:
        return read(path)
    except errors as error:
        raise ValueError(f"{path}: got a file that cannot be read ({error}), expected a complete one") from error
