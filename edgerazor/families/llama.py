"""Llama 2 and 3, and the many models of that architecture (SmolLM 2, TinyLlama, MobileLLM ...)."""

from edgerazor.families.core.base import (
    GGUF_ALL_BIASES,
    GGUF_ROPE_TYPES,
    Family,
    GgufArchitecture,
    NativeArchitecture,
    attention_bias,
    configure_llama,
    mlp_bias,
)

FAMILY = Family(
    native=NativeArchitecture(
        "LlamaRotaryEmbedding", qkv_bias=attention_bias, o_bias=attention_bias, mlp_bias=mlp_bias
    ),
    gguf=GgufArchitecture(
        "llama",
        interleaved_rope=True,
        configure=configure_llama,
        biases=GGUF_ALL_BIASES,
        rope_types=GGUF_ROPE_TYPES | {"llama3"},
    ),
)
