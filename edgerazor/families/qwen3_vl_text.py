"""Qwen 3 VL's decoder: Qwen 3, whose positions of pictures have three dimensions, and features behind early layers."""

from edgerazor.families.core.base import (
    NORMS_BEFORE,
    QK_NORMS,
    Family,
    NativeArchitecture,
    attention_bias,
)

FAMILY = Family(
    native=NativeArchitecture(
        "Qwen3VLTextRotaryEmbedding",
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        norms={**NORMS_BEFORE, **QK_NORMS},
    ),
)
