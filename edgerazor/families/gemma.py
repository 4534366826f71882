"""Gemma 1: gains of norms are stored less one, embeddings are scaled by the root of their width."""

from edgerazor.families.core.base import (
    Family,
    GgufArchitecture,
    NativeArchitecture,
    attention_bias,
    configure_gemma,
    looks_ahead,
    looks_ahead_in_gguf,
    root_of_width,
)

FAMILY = Family(
    native=NativeArchitecture(
        "GemmaRotaryEmbedding",
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        norm_offset=1.0,
        embedding_scale=root_of_width,
        unsupported=looks_ahead,
    ),
    gguf=GgufArchitecture(
        "gemma",
        interleaved_rope=False,
        configure=configure_gemma,
        norm_offset=1.0,
        float16=False,
        head="never",
        activation="gelu_pytorch_tanh",
        unsupported=looks_ahead_in_gguf,
    ),
)
