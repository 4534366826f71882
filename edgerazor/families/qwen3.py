"""Qwen 3: Llama with a norm of each head's queries and keys; some layers may see a sliding window."""

from edgerazor.families.core.base import (
    GGUF_QKV_BIASES,
    NORMS_BEFORE,
    QK_NORMS,
    Family,
    GgufArchitecture,
    NativeArchitecture,
    attention_bias,
    configure_qwen,
    window_by_layer_type,
)

FAMILY = Family(
    native=NativeArchitecture(
        "Qwen3RotaryEmbedding",
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        norms={**NORMS_BEFORE, **QK_NORMS},
        window=window_by_layer_type,
    ),
    gguf=GgufArchitecture(
        "qwen3", interleaved_rope=False, configure=configure_qwen, biases=GGUF_QKV_BIASES, qk_norms=True
    ),
)
