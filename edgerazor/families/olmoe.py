"""OLMoE: a mixture of experts with one norm over all heads of queries and of keys."""

from typing import Any

from edgerazor.families.core.base import (
    NORMS_BEFORE,
    QK_NORMS,
    Experts,
    Family,
    GgufArchitecture,
    GgufMetadata,
    NativeArchitecture,
    attention_bias,
    configure_experts,
    rms_epsilon,
)


def _configure(get: GgufMetadata) -> dict[str, Any]:
    usual = {"norm_topk_prob": False, "clip_qkv": None, "attention_bias": False}
    return {**rms_epsilon(get), **configure_experts(get), **usual, "rope_parameters": get.rope_parameters()}


def _experts(config: Any, layer: int) -> Experts:
    return Experts(
        "mlp.experts",
        "mlp.gate",
        config.num_experts,
        config.num_experts_per_tok,
        config.intermediate_size,
        normalized=config.norm_topk_prob,
    )


def _not_native(config: Any) -> str:
    return "" if config.clip_qkv is None else "clipped queries, keys and values (clip_qkv)"


def _unsupported(config: dict[str, Any]) -> str:
    if config.get("clip_qkv") is not None:
        return "llama.cpp's olmoe does not clip queries, keys and values (clip_qkv)"
    if config.get("norm_topk_prob"):
        return "llama.cpp's olmoe does not normalize the weights of a token's experts (norm_topk_prob)"
    if config["num_key_value_heads"] != config["num_attention_heads"]:
        return "llama.cpp's olmoe has as many heads of keys as of queries"
    return ""


FAMILY = Family(
    native=NativeArchitecture(
        "OlmoeRotaryEmbedding",
        experts=_experts,
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        norms={**NORMS_BEFORE, **QK_NORMS},
        norm_all_heads=True,
        unsupported=_not_native,
    ),
    gguf=GgufArchitecture(
        "olmoe",
        interleaved_rope=False,
        head="always",
        configure=_configure,
        qk_norms=True,
        experts=True,
        unsupported=_unsupported,
    ),
)
