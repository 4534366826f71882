"""Gemma 2: every second layer sees a window, and logits and scores are capped; 27B scales scores by its width."""

from typing import Any

from edgerazor.families.core.base import (
    GGUF_NORMS_AROUND,
    NORMS_AROUND,
    Family,
    GgufArchitecture,
    GgufMetadata,
    GgufValue,
    NativeArchitecture,
    attention_bias,
    by_query_scalar,
    configure_gemma,
    every_nth_is_full,
    final_soft_cap,
    gemma_query_scalar,
    hidden_activation,
    looks_ahead,
    looks_ahead_in_gguf,
    root_of_width,
    window_by_layer_type,
)

CAPS = ("attn_logit_softcapping", "final_logit_softcapping")


def _attention_soft_cap(config: Any) -> float:
    return float(config.attn_logit_softcapping or 0.0)


def _configure(get: GgufMetadata) -> dict[str, Any]:
    return {
        **configure_gemma(get),
        **{key: get.decimal(key, 0.0) if get.value(key, 0.0) else None for key in CAPS},
        "sliding_window": get.number("attention.sliding_window", 4096),
        "layer_types": get.layer_types(2),
        "query_pre_attn_scalar": gemma_query_scalar(get, get.number("block_count") == 46),
    }


def _metadata(config: dict[str, Any]) -> dict[str, GgufValue]:
    """The window and both caps, which are settings and keys of one name."""
    return {"attention.sliding_window": config["sliding_window"], **{key: float(config[key]) for key in CAPS}}


def _gguf_unsupported(config: dict[str, Any]) -> str:
    """llama.cpp's code gives every second layer no window, always caps, and knows one scale of scores but for 27B."""
    by_width = config["num_hidden_layers"] == 46
    usual = config["hidden_size"] // config["num_attention_heads"] if by_width else config["head_dim"]
    if config["query_pre_attn_scalar"] != usual:
        return "its attention scores have a scale of their own"
    if not all(config.get(key) for key in CAPS):
        return "its attention scores or its logits are not capped"
    return every_nth_is_full(config, 2) or looks_ahead_in_gguf(config)


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
        "gemma2",
        interleaved_rope=False,
        configure=_configure,
        norm_offset=1.0,
        float16=False,
        head="never",
        parts=GGUF_NORMS_AROUND,
        metadata=_metadata,
        activation="gelu_pytorch_tanh",
        windows=True,
        unsupported=_gguf_unsupported,
    ),
)
