"""Language models of google-tunix as plain functions; needs the extra `language`."""

from eupmu_jax.models.language.adapter import LanguageModel, from_tunix
from eupmu_jax.models.language.huggingface import load_huggingface

__all__ = ["LanguageModel", "from_tunix", "load_huggingface"]
