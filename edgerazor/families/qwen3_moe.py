"""Qwen 3 as a mixture of experts: every layer has them, and the weights of a token's experts are normalized."""

from typing import Any

from edgerazor.families.core.base import (
    GGUF_QKV_BIASES,
    Family,
    GgufArchitecture,
    GgufMetadata,
    configure_experts,
    configure_qwen,
)


def _configure(get: GgufMetadata) -> dict[str, Any]:
    usual = {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
    return {
        **configure_qwen(get),
        **configure_experts(get),
        **usual,
        "moe_intermediate_size": get.number("expert_feed_forward_length"),
    }


def _unsupported(config: dict[str, Any]) -> str:
    if not config.get("norm_topk_prob"):
        return "llama.cpp's qwen3moe normalizes the weights of a token's experts (norm_topk_prob)"
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step") != 1:
        return "some of its layers have no experts"
    return ""


FAMILY = Family(
    gguf=GgufArchitecture(
        "qwen3moe",
        interleaved_rope=False,
        configure=_configure,
        biases=GGUF_QKV_BIASES,
        qk_norms=True,
        experts=True,
        unsupported=_unsupported,
    )
)
