"""OLMoE: a mixture of experts with one norm over all heads of queries and of keys."""

from typing import Any

from edgerazor.families.core.base import Family, GgufArchitecture, GgufMetadata, configure_experts, rms_epsilon


def _configure(get: GgufMetadata) -> dict[str, Any]:
    usual = {"norm_topk_prob": False, "clip_qkv": None, "attention_bias": False}
    return {**rms_epsilon(get), **configure_experts(get), **usual, "rope_parameters": get.rope_parameters()}


def _unsupported(config: dict[str, Any]) -> str:
    if config.get("clip_qkv") is not None:
        return "llama.cpp's olmoe does not clip queries, keys and values (clip_qkv)"
    if config.get("norm_topk_prob"):
        return "llama.cpp's olmoe does not normalize the weights of a token's experts (norm_topk_prob)"
    return ""


FAMILY = Family(
    gguf=GgufArchitecture(
        "olmoe",
        interleaved_rope=False,
        configure=_configure,
        qk_norms=True,
        experts=True,
        unsupported=_unsupported,
    )
)
