"""Language models of google-tunix as plain functions; needs the extra `language`."""

from eupmu_jax.models.language.adapter import LanguageModel, from_tunix
from eupmu_jax.models.language.generation import generate
from eupmu_jax.models.language.gguf import gguf_tokenizer, load_gguf, smollm2
from eupmu_jax.models.language.huggingface import huggingface_tokenizer, load_huggingface, save_huggingface
from eupmu_jax.models.language.lora import merge_lora, with_lora
from eupmu_jax.models.language.tokenizer import Tokenizer

__all__ = [
    "LanguageModel",
    "Tokenizer",
    "from_tunix",
    "generate",
    "gguf_tokenizer",
    "huggingface_tokenizer",
    "load_gguf",
    "load_huggingface",
    "merge_lora",
    "save_huggingface",
    "smollm2",
    "with_lora",
]
