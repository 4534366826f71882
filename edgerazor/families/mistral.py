"""Mistral 7B and its kin: Llama without biases, with one sliding window for all layers. llama.cpp has no other name."""

from edgerazor.families.core.base import (
    GGUF_ALL_BIASES,
    GGUF_ROPE_TYPES,
    Family,
    GgufArchitecture,
    NativeArchitecture,
)

FAMILY = Family(
    native=NativeArchitecture("MistralRotaryEmbedding", window=lambda config, layer: config.sliding_window),
    gguf=GgufArchitecture(
        "llama",
        interleaved_rope=True,
        biases=GGUF_ALL_BIASES,
        rope_types=GGUF_ROPE_TYPES | {"llama3"},
        all_layers_slide=True,
    ),
)
