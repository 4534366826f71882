"""Qwen 3 as a mixture of experts, which every layer may have or some."""

from typing import Any

from edgerazor.families.core.base import (
    GGUF_QKV_BIASES,
    NORMS_BEFORE,
    QK_NORMS,
    Experts,
    Family,
    GgufArchitecture,
    GgufMetadata,
    NativeArchitecture,
    attention_bias,
    configure_experts,
    configure_qwen,
    window_of_all,
)


def _configure(get: GgufMetadata) -> dict[str, Any]:
    usual = {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
    return {
        **configure_qwen(get),
        **configure_experts(get),
        **usual,
        "moe_intermediate_size": get.number("expert_feed_forward_length"),
    }


def _experts(config: Any, layer: int) -> Experts | None:
    """As in `Qwen3MoeDecoderLayer`."""
    if layer in config.mlp_only_layers or (layer + 1) % config.decoder_sparse_step:
        return None
    return Experts(
        "mlp.experts",
        "mlp.gate",
        config.num_experts,
        config.num_experts_per_tok,
        config.moe_intermediate_size,
        normalized=config.norm_topk_prob,
    )


def _unsupported(config: dict[str, Any]) -> str:
    if not config.get("norm_topk_prob"):
        return "llama.cpp's qwen3moe normalizes the weights of a token's experts (norm_topk_prob)"
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step") != 1:
        return "some of its layers have no experts"
    return ""


FAMILY = Family(
    native=NativeArchitecture(
        "Qwen3MoeRotaryEmbedding",
        experts=_experts,
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        norms={**NORMS_BEFORE, **QK_NORMS},
        window=window_of_all,
    ),
    gguf=GgufArchitecture(
        "qwen3moe",
        interleaved_rope=False,
        configure=_configure,
        biases=GGUF_QKV_BIASES,
        qk_norms=True,
        experts=True,
        unsupported=_unsupported,
    ),
)
