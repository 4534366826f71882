"""Gemma 3, text: five layers with a window and positions of their own, one without; 27B scales scores by its width."""

from typing import Any

from edgerazor.families.core.base import (
    GGUF_NORMS_AROUND,
    NORMS_AROUND,
    QK_NORMS,
    Family,
    GgufArchitecture,
    GgufMetadata,
    GgufValue,
    NativeArchitecture,
    attention_bias,
    by_query_scalar,
    every_nth_is_full,
    final_soft_cap,
    gemma_query_scalar,
    hidden_activation,
    looks_ahead,
    looks_ahead_in_gguf,
    rms_epsilon,
    root_of_width,
    rope_by_layer_type,
    window_by_layer_type,
)


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


def _metadata(config: dict[str, Any]) -> dict[str, GgufValue]:
    """Positions of layers with a window, and the window."""
    local = config["rope_parameters"]["sliding_attention"]
    return {"attention.sliding_window": config["sliding_window"], "rope.freq_base_swa": float(local["rope_theta"])}


def _gguf_unsupported(config: dict[str, Any]) -> str:
    """llama.cpp's code gives every sixth layer no window, and knows one scale of scores but for 27B."""
    if problem := every_nth_is_full(config, 6):
        return problem
    by_width = config["num_hidden_layers"] == 62
    scalar = config["hidden_size"] // config["num_attention_heads"] if by_width else config["head_dim"]
    if config["query_pre_attn_scalar"] != scalar:
        return "its attention scores have a scale of their own"
    if config.get("final_logit_softcapping"):
        return "its logits are capped"
    if config["rope_parameters"]["sliding_attention"]["rope_type"] != "default":
        return "the positions of its layers with a window are scaled"
    return looks_ahead_in_gguf(config)


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
        logit_soft_cap=final_soft_cap,
        unsupported=looks_ahead,
    ),
    gguf=GgufArchitecture(
        "gemma3",
        interleaved_rope=False,
        configure=_configure,
        norm_offset=1.0,
        float16=False,
        parts=GGUF_NORMS_AROUND,
        metadata=_metadata,
        activation="gelu_pytorch_tanh",
        qk_norms=True,
        windows=True,
        unsupported=_gguf_unsupported,
    ),
)
