"""Language models from folders in the format of Hugging Face."""

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp

from eupmu_jax.models.language._tensors import Tensors, build
from eupmu_jax.models.language.adapter import LanguageModel


def load_huggingface(folder: str | os.PathLike[str], dtype: jax.typing.DTypeLike = jnp.float32) -> LanguageModel:
    """Reads config.json and the weights in *.safetensors; nothing is downloaded, and PyTorch is not needed.

    Architectures: llama, qwen2, qwen3, gemma, gemma2 and gemma3_text, dense. Every setting that google-tunix would
    silently compute otherwise is refused: scaled rotary positions, other activations, sliding windows of Qwen. A Qwen 3
    whose `rope_theta` is not 1,000,000 is refused too: that class has the number written into its code.

    Args:
      folder: As written by `save_pretrained`, or downloaded from the Hub.
      dtype: Of parameters and computation.

    Raises:
      FileNotFoundError: If config.json or the weights are missing.
      ImportError: Without the extra `language`.
      ValueError: For another architecture or setting, and for tensors that are missing, left over or of other shapes;
        nothing has been read then.

    >>> load_huggingface("nowhere")
    Traceback (most recent call last):
    FileNotFoundError: folder: got nowhere without config.json and *.safetensors, expected what save_pretrained writes
    """
    folder = Path(folder)
    files = sorted(folder.glob("*.safetensors"))
    found = {"config.json": (folder / "config.json").exists(), "*.safetensors": bool(files)}
    if missing := " and ".join(name for name in found if not found[name]):
        raise FileNotFoundError(f"folder: got {folder} without {missing}, expected what save_pretrained writes")
    config = json.loads((folder / "config.json").read_text())
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise ImportError("language models need safetensors: pip install 'eupmu-jax[language]'") from error
    # Slices of NumPy know no bfloat16; those of Flax are arrays of JAX, whatever their dtype.
    opened = [safe_open(file, framework="flax") for file in files]
    owner = {name: file for file in opened for name in file.keys()}  # noqa: SIM118
    shapes = {name: tuple(file.get_slice(name).get_shape()) for name, file in owner.items()}
    return build(config, Tensors(str(folder), shapes, lambda name: owner[name].get_tensor(name)), dtype)
