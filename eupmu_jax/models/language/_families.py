"""Maps configurations, as in the config.json of Hugging Face, to classes of google-tunix."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

FAMILIES = ("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")


@dataclasses.dataclass(frozen=True)
class ScaledBase:
    """A base of rotary positions whose powers are the scaled periods of Llama 3.1 and later.

    google-tunix has no such scaling, but it only raises the base to fractions of a head's width, so a base that defines
    its own powers is enough. Periods longer than `original / low` become `factor` times as long, those shorter than
    `original / high` stay unchanged, and the frequencies between are interpolated.

    >>> base = ScaledBase(100_000.0, factor=8.0, low=1.0, high=4.0, original=256)
    >>> (base ** jnp.array([0.0, 0.25, 0.5])).astype(int).tolist()
    [1, 35, 2529]
    """

    base: float
    factor: float
    low: float
    high: float
    original: int

    def __pow__(self, fraction: jax.Array) -> jax.Array:
        period = self.base**fraction
        kept = jnp.clip((self.original / (2 * math.pi * period) - self.low) / (self.high - self.low), 0, 1)
        return period / (kept + (1 - kept) / self.factor)


class Settings:
    """A configuration that raises an error naming the file for entries that are missing or not supported."""

    def __init__(self, entries: Mapping[str, Any], where: str):
        self.entries, self.where = entries, where

    def get(self, name: str, default: Any = None) -> Any:
        """The entry, or the default if there is none."""
        value = self.entries.get(name)
        value = default if value is None else value
        if value is None:
            raise ValueError(f"{self.where}: got no {name}, expected one")
        return value

    def expect(self, name: str, wanted: Any, value: Any = None) -> None:
        """Refuses an entry (or the value found for it) that is given and differs from the only supported one."""
        value = self.entries.get(name) if value is None else value
        if value is not None and value != wanted:
            raise ValueError(f"{self.where}: got {name} {value}, expected {wanted}, all that google-tunix supports")

    def sizes(self) -> dict[str, int]:
        """The sizes, under the names that all configurations of google-tunix share."""
        heads, width = self.get("num_attention_heads"), self.get("hidden_size")
        return {
            "num_layers": self.get("num_hidden_layers"),
            "embed_dim": width,
            "hidden_dim": self.get("intermediate_size"),
            "num_heads": heads,
            "num_kv_heads": self.get("num_key_value_heads", heads),
            "head_dim": self.get("head_dim", width // heads),
        }

    def rope_base(self, default: float, attention: str | None = None) -> float:
        """Base of the rotary positions; for one kind of attention, if the file has one for each."""
        rope = self._rope(attention)
        self.expect("rope_type", "default", rope.get("rope_type", rope.get("type")))
        old = self.entries.get("rope_local_base_freq" if attention == "sliding_attention" else "rope_theta")
        return rope.get("rope_theta") or old or default

    def scaled_rope_base(self, default: float) -> float | ScaledBase:
        """As `rope_base`, if the periods may be scaled as in Llama 3.1 and later."""
        rope = self._rope(None)
        if rope.get("rope_type", rope.get("type")) != "llama3":
            return self.rope_base(default)
        base = rope.get("rope_theta") or self.entries.get("rope_theta") or default
        rope = Settings(rope, f"{self.where}: rope_parameters")
        sizes = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        return ScaledBase(base, *(rope.get(name) for name in sizes))

    def _rope(self, attention):
        rope = self.entries.get("rope_parameters") or self.entries.get("rope_scaling") or {}
        return rope.get(attention) or rope

    def expect_attention(self, *pattern: str) -> None:
        """Refuses models whose blocks do not repeat this pattern of attention kinds."""
        wanted = [pattern[i % len(pattern)] for i in range(self.get("num_hidden_layers"))]
        self.expect("layer_types", wanted)


def model_of(settings: Settings, tied: bool, dtype: Any, remat: bool = False) -> Any:
    """The model with placeholder parameters; with `remat` the backward pass recomputes each block.

    Raises:
      ValueError: If google-tunix has no class for the architecture, or does not support the settings.
    """
    family = settings.entries.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"{settings.where}: got architecture {family}, expected one of {', '.join(FAMILIES)}")
    if family == "gemma3_text":
        model = _gemma_3(settings, dtype)
    elif family.startswith("gemma"):
        model = _gemma(settings, family == "gemma2", dtype)
    else:
        model = _llama_or_qwen(settings, family, tied, dtype)
    if remat:
        # Some classes read the configuration, others the copy in their blocks.
        for part in (model.config, *(layer for layer in model.layers if hasattr(layer, "remat_config"))):
            part.remat_config = type(model.config.remat_config).BLOCK
    return model


def _llama_or_qwen(settings, family, tied, dtype):
    from tunix.models.qwen2.model import ModelConfig, Qwen2
    from tunix.models.qwen3.model import ModelConfig as Config3
    from tunix.models.qwen3.model import Qwen3

    settings.expect("hidden_act", "silu")
    settings.expect("use_sliding_window", False)
    settings.expect_attention("full_attention")
    entries = settings.sizes() | {
        "vocab_size": settings.get("vocab_size"),
        "rope_theta": settings.scaled_rope_base(10_000.0) if family == "llama" else settings.rope_base(10_000.0),
        "norm_eps": settings.get("rms_norm_eps"),
        "use_tied_embedding": tied,
        "dtype": dtype,
        "param_dtype": dtype,
    }
    if family == "qwen3":
        # This class, like that of Llama 3, hard-codes the base.
        settings.expect("rope_theta", 1_000_000, entries["rope_theta"])
        return Qwen3(Config3(**entries), rngs=nnx.Rngs(0))
    model = Qwen2(ModelConfig(**entries), rngs=nnx.Rngs(0))
    if family == "llama":
        # A Llama is a Qwen 2 whose three biases are zero and not trainable.
        for layer in model.layers:
            for name in ("q_bias", "k_bias", "v_bias"):
                setattr(layer.attn, name, nnx.Variable(jnp.zeros_like(getattr(layer.attn, name)[...])))
    return model


def _gemma(settings, second, dtype):
    from tunix.models.gemma.model import AttentionType, Gemma, ModelConfig

    _expect_gemma(settings)
    settings.expect("rope_theta", 10_000, settings.rope_base(10_000.0))
    kinds = (AttentionType.LOCAL_SLIDING, AttentionType.GLOBAL) if second else (AttentionType.GLOBAL,)
    if second:
        settings.expect_attention("sliding_attention", "full_attention")
    layers = settings.get("num_hidden_layers")
    config = ModelConfig(
        **settings.sizes(),
        num_embed=settings.get("vocab_size"),
        # An entry that is null means no cap.
        final_logit_softcap=settings.entries.get("final_logit_softcapping", 30.0) if second else None,
        attn_logits_soft_cap=settings.entries.get("attn_logit_softcapping", 50.0) if second else None,
        use_post_attn_norm=second,
        use_post_ffw_norm=second,
        attention_types=tuple(kinds[i % len(kinds)] for i in range(layers)),
        sliding_window_size=settings.get("sliding_window", 4_096) if second else None,
    )
    return _cast(Gemma(config, rngs=nnx.Rngs(0)), dtype)


def _gemma_3(settings, dtype):
    from tunix.models.gemma3.model import Gemma3, ModelConfig

    _expect_gemma(settings)
    settings.expect("final_logit_softcapping", "null")
    settings.expect("attn_logit_softcapping", "null")
    settings.expect("sliding_window_pattern", 6)
    settings.expect_attention(*["sliding_attention"] * 5, "full_attention")
    config = ModelConfig(
        **settings.sizes(),
        num_embed=settings.get("vocab_size"),
        sliding_window_size=settings.get("sliding_window", 4_096),
        local_base_frequency=settings.rope_base(10_000.0, "sliding_attention"),
        global_base_frequency=settings.rope_base(1_000_000.0, "full_attention"),
        param_dtype=dtype,
    )
    return _cast(Gemma3(config, rngs=nnx.Rngs(0)), dtype)


def _expect_gemma(settings):
    settings.expect("hidden_activation", "gelu_pytorch_tanh")
    settings.expect("rms_norm_eps", 1e-6)
    settings.expect("tie_word_embeddings", True)
    settings.expect("use_bidirectional_attention", False)
    settings.expect("query_pre_attn_scalar", settings.sizes()["head_dim"])


def _cast(model, dtype):
    """Casts the parameters, as these classes compute in their dtype and not all take a dtype argument."""
    nnx.update(model, nnx.map(lambda _, leaf: leaf.astype(dtype), nnx.state(model, nnx.Param)))
    return model
