"""OLMo 3: OLMo 2 with windows in three of four layers, which have positions of their own."""

from edgerazor.families.core.base import (
    NORMS_AFTER,
    QK_NORMS,
    Family,
    NativeArchitecture,
    attention_bias,
    rope_by_layer_type,
    window_by_layer_type,
)

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
)
