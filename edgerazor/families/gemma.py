"""Gemma 1: gains of norms are stored less one, embeddings are scaled by the root of their width."""

from edgerazor.families.core.base import (
    Family,
    GgufArchitecture,
    NativeArchitecture,
    attention_bias,
    configure_gemma,
    root_of_width,
)

FAMILY = Family(
    native=NativeArchitecture(
        "GemmaRotaryEmbedding",
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        norm_offset=1.0,
        embedding_scale=root_of_width,
    ),
    gguf=GgufArchitecture(
        "gemma", interleaved_rope=False, configure=configure_gemma, norm_offset=1.0, float16=False, exported=False
    ),
)
