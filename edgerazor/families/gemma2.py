"""Gemma 2: every second layer sees a window, and logits and scores are capped; 27B scales scores by its width."""

from typing import Any

from edgerazor.families.core.base import (
    NORMS_AROUND,
    Family,
    GgufArchitecture,
    GgufMetadata,
    NativeArchitecture,
    attention_bias,
    by_query_scalar,
    configure_gemma,
    final_soft_cap,
    gemma_query_scalar,
    hidden_activation,
    looks_ahead,
    root_of_width,
    window_by_layer_type,
)


def _attention_soft_cap(config: Any) -> float:
    return float(config.attn_logit_softcapping or 0.0)


def _configure(get: GgufMetadata) -> dict[str, Any]:
    caps = ("attn_logit_softcapping", "final_logit_softcapping")
    return {
        **configure_gemma(get),
        **{key: get.decimal(key, 0.0) if get.value(key, 0.0) else None for key in caps},
        "sliding_window": get.number("attention.sliding_window", 4096),
        "layer_types": get.layer_types(2),
        "query_pre_attn_scalar": gemma_query_scalar(get, get.number("block_count") == 46),
    }


FAMILY = Family(
    native=NativeArchitecture(
        "Gemma2RotaryEmbedding",
        activation=hidden_activation,
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        norms=NORMS_AROUND,
        norm_offset=1.0,
        window=window_by_layer_type,
        attention_scale=by_query_scalar,
        embedding_scale=root_of_width,
        attention_soft_cap=_attention_soft_cap,
        logit_soft_cap=final_soft_cap,
        unsupported=looks_ahead,
    ),
    gguf=GgufArchitecture(
        "gemma2", interleaved_rope=False, configure=_configure, norm_offset=1.0, float16=False, exported=False
    ),
)
