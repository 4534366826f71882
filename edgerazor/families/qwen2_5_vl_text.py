"""Qwen 2.5 VL's decoder: Qwen 2.5, whose positions of pictures have three dimensions."""

from typing import Any

from edgerazor.families.core.base import (
    GGUF_QKV_BIASES,
    Family,
    GgufArchitecture,
    GgufValue,
    NativeArchitecture,
    always,
    heads_are_narrow,
    window_by_layer_type,
)


def _metadata(config: dict[str, Any]) -> dict[str, GgufValue]:
    """How many frequencies of a head count time, height and width; llama.cpp knows a fourth dimension."""
    return {"rope.dimension_sections": [*config["rope_parameters"]["mrope_section"], 0]}


FAMILY = Family(
    native=NativeArchitecture("Qwen2_5_VLRotaryEmbedding", qkv_bias=always, window=window_by_layer_type),
    gguf=GgufArchitecture(
        "qwen2vl",
        interleaved_rope=False,
        metadata=_metadata,
        biases=GGUF_QKV_BIASES,
        unsupported=heads_are_narrow,
    ),
)
