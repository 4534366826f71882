"""Qwen 2 and 2.5: Llama with biases of queries, keys and values; some layers may see a sliding window."""

from typing import Any

from edgerazor.families.core.base import (
    GGUF_QKV_BIASES,
    Family,
    GgufArchitecture,
    NativeArchitecture,
    always,
    configure_qwen,
    head_size,
    window_by_layer_type,
)


def _gguf_unsupported(config: dict[str, Any]) -> str:
    """llama.cpp's code takes the width of all heads together to be that of the model."""
    if head_size(config) * config["num_attention_heads"] != config["hidden_size"]:
        return "its heads together are not as wide as the model"
    return ""


FAMILY = Family(
    native=NativeArchitecture("Qwen2RotaryEmbedding", qkv_bias=always, window=window_by_layer_type),
    gguf=GgufArchitecture(
        "qwen2",
        interleaved_rope=False,
        configure=configure_qwen,
        biases=GGUF_QKV_BIASES,
        unsupported=_gguf_unsupported,
    ),
)
