"""Qwen 2 and 2.5: Llama with biases of queries, keys and values; some layers may see a sliding window."""

from edgerazor.families.core.base import (
    GGUF_QKV_BIASES,
    Family,
    GgufArchitecture,
    NativeArchitecture,
    always,
    configure_qwen,
    heads_are_narrow,
    window_by_layer_type,
)

FAMILY = Family(
    native=NativeArchitecture("Qwen2RotaryEmbedding", qkv_bias=always, window=window_by_layer_type),
    gguf=GgufArchitecture(
        "qwen2",
        interleaved_rope=False,
        configure=configure_qwen,
        biases=GGUF_QKV_BIASES,
        unsupported=heads_are_narrow,
    ),
)
