"""Phi 3: q, k, v in one matrix, gate and up in another; long contexts have factors of their own."""

from typing import Any

from edgerazor.families.core.base import (
    GGUF_LONG_FACTORS,
    GGUF_SHORT_FACTORS,
    Family,
    GgufArchitecture,
    GgufMetadata,
    NativeArchitecture,
    rms_epsilon,
    window_of_all,
)


def _configure(get: GgufMetadata) -> dict[str, Any]:
    parameters = get.rope_parameters()
    size, context = get.head_size(), get.number("context_length")
    original = get.number("rope.scaling.original_context_length", context)
    if get.has_tensor(GGUF_LONG_FACTORS) and get.has_tensor(GGUF_SHORT_FACTORS):
        factors = {
            "long_factor": get.rope_factors(GGUF_LONG_FACTORS),
            "short_factor": get.rope_factors(GGUF_SHORT_FACTORS),
        }
        parameters = {"rope_theta": parameters["rope_theta"], "rope_type": "longrope", **factors}
        parameters |= {"factor": context / original, "original_max_position_embeddings": original}
    part = get.number("rope.dimension_count", size) / size
    parameters["partial_rotary_factor"] = part
    window = get.number("attention.sliding_window", 0, least=0)
    return {
        **rms_epsilon(get),
        "partial_rotary_factor": part,
        "rope_parameters": parameters,
        "original_max_position_embeddings": original,
        "sliding_window": window or None,
    }


FAMILY = Family(
    native=NativeArchitecture(
        "Phi3RotaryEmbedding",
        linears={
            **{"qkv": "self_attn.qkv_proj", "o": "self_attn.o_proj"},
            **{"gate_up": "mlp.gate_up_proj", "down": "mlp.down_proj"},
        },
        window=window_of_all,
    ),
    gguf=GgufArchitecture("phi3", interleaved_rope=False, configure=_configure, partial_rope=True, exported=False),
)
