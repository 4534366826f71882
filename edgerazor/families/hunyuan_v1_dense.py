"""Hunyuan dense (0.5B to 7B): Llama with a norm of each head's queries and keys, behind RoPE."""

from typing import Any

from edgerazor.families.core.base import (
    NORMS_BEFORE,
    Family,
    GgufArchitecture,
    GgufMetadata,
    NativeArchitecture,
    attention_bias,
    head_size,
    rms_epsilon,
    rope_as_configured,
)


def _configure(get: GgufMetadata) -> dict[str, Any]:
    """Files have the base of positions that a fixed factor (`alpha`) made."""
    return {**rms_epsilon(get), "attention_bias": False, "rope_parameters": get.rope_parameters()}


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """A fixed factor only makes the base larger."""
    parameters = rope_as_configured(config)
    if parameters.get("rope_type") == "dynamic" and (alpha := parameters.get("alpha")):
        width = head_size(config)
        base = parameters["rope_theta"] * alpha ** (width / (width - 2))
        return {"rope_type": "default", "rope_theta": base}
    return parameters


FAMILY = Family(
    native=NativeArchitecture(
        "HunYuanDenseV1RotaryEmbedding",
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        norms={**NORMS_BEFORE, "q_norm": "self_attn.query_layernorm", "k_norm": "self_attn.key_layernorm"},
        norm_after_rope=True,
    ),
    gguf=GgufArchitecture(
        "hunyuan-dense",
        interleaved_rope=False,
        configure=_configure,
        parts={"self_attn.query_layernorm": "attn_q_norm", "self_attn.key_layernorm": "attn_k_norm"},
        qk_norms=True,
        rope=_rope,
    ),
)
