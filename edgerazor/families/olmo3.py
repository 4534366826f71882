"""OLMo 3: OLMo 2 with windows in three of four layers, which have positions of their own."""

from typing import Any

from edgerazor.families.core.base import (
    GGUF_NORMS_AROUND,
    NORMS_AFTER,
    QK_NORMS,
    Family,
    GgufArchitecture,
    GgufValue,
    NativeArchitecture,
    attention_bias,
    every_nth_is_full,
    heads_are_narrow,
    rope_by_layer_type,
    window_by_layer_type,
)


def _metadata(config: dict[str, Any]) -> dict[str, GgufValue]:
    """The window, and which layers have one."""
    slides = [kind == "sliding_attention" for kind in config["layer_types"]]
    return {"attention.sliding_window": config["sliding_window"], "attention.sliding_window_pattern": slides}


def _gguf_unsupported(config: dict[str, Any]) -> str:
    """llama.cpp's code has one base of all positions, and scales those of layers without a window alone."""
    full, local = (config["rope_parameters"][kind] for kind in ("full_attention", "sliding_attention"))
    if local["rope_type"] != "default" or local["rope_theta"] != full["rope_theta"]:
        return "the positions of its layers with a window are scaled, or have a base of their own"
    return every_nth_is_full(config, 4) or heads_are_narrow(config)


FAMILY = Family(
    native=NativeArchitecture(
        "Olmo3RotaryEmbedding",
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        norms={**NORMS_AFTER, **QK_NORMS},
        norm_all_heads=True,
        rope_table=rope_by_layer_type,
        window=window_by_layer_type,
    ),
    gguf=GgufArchitecture(
        "olmo2",
        interleaved_rope=False,
        head="always",
        parts=GGUF_NORMS_AROUND,
        metadata=_metadata,
        qk_norms=True,
        windows=True,
        unsupported=_gguf_unsupported,
    ),
)
