"""OLMo 2: norms behind attention and MLP instead of before, and one norm over all heads of queries and of keys."""

from typing import Any

from edgerazor.families.core.base import (
    GGUF_NORMS_AROUND,
    NORMS_AFTER,
    QK_NORMS,
    Family,
    GgufArchitecture,
    GgufMetadata,
    NativeArchitecture,
    attention_bias,
    configure_llama,
    heads_are_narrow,
)


def _configure(get: GgufMetadata) -> dict[str, Any]:
    """OLMo 3 has the same name in files, and windows."""
    settings, window = configure_llama(get), get.number("attention.sliding_window", 0, least=0)
    if not window:
        return settings
    rope = settings["rope_parameters"]
    local = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    positions = {"full_attention": rope, "sliding_attention": local}
    windows = {"sliding_window": window, "layer_types": get.layer_types(4)}
    return {**settings, **windows, "model_type": "olmo3", "rope_parameters": positions}


FAMILY = Family(
    native=NativeArchitecture(
        "Olmo2RotaryEmbedding",
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        norms={**NORMS_AFTER, **QK_NORMS},
        norm_all_heads=True,
    ),
    gguf=GgufArchitecture(
        "olmo2",
        interleaved_rope=False,
        configure=_configure,
        head="always",
        parts=GGUF_NORMS_AROUND,
        qk_norms=True,
        unsupported=heads_are_narrow,
    ),
)
