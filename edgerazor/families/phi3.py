"""Phi 3: q, k, v in one matrix, gate and up in another; long contexts have factors of their own."""

import math
from typing import Any

from edgerazor.families.core.base import (
    GGUF_LONG_FACTORS,
    GGUF_SHORT_FACTORS,
    Family,
    GgufArchitecture,
    GgufMetadata,
    GgufValue,
    NativeArchitecture,
    heads_are_narrow,
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


def _metadata(config: dict[str, Any]) -> dict[str, GgufValue]:
    """The original context, and the factor of attention that belongs to long ones."""
    rope, longest = config["rope_parameters"], config["max_position_embeddings"]
    if rope["rope_type"] != "longrope":
        return {}
    original = rope["original_max_position_embeddings"]
    factor, attention = rope.get("factor") or longest / original, rope.get("attention_factor")
    if attention is None:
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return {
        "rope.scaling.type": "longrope",
        "rope.scaling.attn_factor": float(attention),
        "rope.scaling.original_context_length": original,
    }


def _rope_factors(config: dict[str, Any]) -> dict[str, list[float]]:
    rope = config["rope_parameters"]
    if rope["rope_type"] != "longrope":
        return {}
    return {GGUF_LONG_FACTORS: rope["long_factor"], GGUF_SHORT_FACTORS: rope["short_factor"]}


def _note(config: dict[str, Any]) -> str:
    if config["rope_parameters"]["rope_type"] != "longrope":
        return ""
    original = config["rope_parameters"]["original_max_position_embeddings"]
    return (
        f"llama.cpp takes the positions of long texts wherever the context that it is given is longer than {original} "
        "tokens, transformers where the text is."
    )


FAMILY = Family(
    native=NativeArchitecture(
        "Phi3RotaryEmbedding",
        linears={
            **{"qkv": "self_attn.qkv_proj", "o": "self_attn.o_proj"},
            **{"gate_up": "mlp.gate_up_proj", "down": "mlp.down_proj"},
        },
        window=window_of_all,
    ),
    gguf=GgufArchitecture(
        "phi3",
        interleaved_rope=False,
        configure=_configure,
        partial_rope=True,
        parts={"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"},
        metadata=_metadata,
        rope_types=frozenset({"default", "longrope"}),
        rope_factors=_rope_factors,
        all_layers_slide=True,
        unsupported=heads_are_narrow,
        note=_note,
    ),
)
