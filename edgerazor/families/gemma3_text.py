"""Gemma 3, text: five layers with a window and positions of their own, one without; 27B scales scores by its width."""

from typing import Any

from edgerazor.families.core.base import (
    NORMS_AROUND,
    QK_NORMS,
    Family,
    GgufArchitecture,
    GgufMetadata,
    NativeArchitecture,
    attention_bias,
    by_query_scalar,
    gemma_query_scalar,
    hidden_activation,
    rms_epsilon,
    root_of_width,
    rope_by_layer_type,
    window_by_layer_type,
)


def _logit_soft_cap(config: Any) -> float:
    return config.final_logit_softcapping or 0.0


def _unsupported(config: Any) -> str:
    return "attention to later tokens" if config.use_bidirectional_attention else ""


def _configure(get: GgufMetadata) -> dict[str, Any]:
    layers, window = get.number("block_count"), get.number("attention.sliding_window", 0, least=0)
    cap = get.decimal("final_logit_softcapping") if get.value("final_logit_softcapping", 0.0) else None
    local = {"rope_type": "default", "rope_theta": get.decimal("rope.freq_base_swa", 10000.0)}
    return {
        **rms_epsilon(get),
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_parameters": {"full_attention": get.rope_parameters(1e6), "sliding_attention": local},
        "sliding_window": window or None,
        "layer_types": get.layer_types(6) if window else ["full_attention"] * layers,
        "query_pre_attn_scalar": gemma_query_scalar(get, layers == 62),
        "final_logit_softcapping": cap,
        "attn_logit_softcapping": None,
    }


FAMILY = Family(
    native=NativeArchitecture(
        "Gemma3RotaryEmbedding",
        activation=hidden_activation,
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        norms={**NORMS_AROUND, **QK_NORMS},
        norm_offset=1.0,
        rope_table=rope_by_layer_type,
        window=window_by_layer_type,
        attention_scale=by_query_scalar,
        embedding_scale=root_of_width,
        logit_soft_cap=_logit_soft_cap,
        unsupported=_unsupported,
    ),
    gguf=GgufArchitecture(
        "gemma3", interleaved_rope=False, configure=_configure, norm_offset=1.0, float16=False, exported=False
    ),
)
