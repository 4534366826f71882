"""OLMo 2: norms behind attention and MLP instead of before, and one norm over all heads of queries and of keys."""

from edgerazor.families.core.base import (
    GGUF_NORMS_AROUND,
    NORMS_AFTER,
    QK_NORMS,
    Family,
    GgufArchitecture,
    NativeArchitecture,
    attention_bias,
    configure_llama,
)

FAMILY = Family(
    native=NativeArchitecture(
        "Olmo2RotaryEmbedding",
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        norms={**NORMS_AFTER, **QK_NORMS},
        norm_all_heads=True,
    ),
    gguf=GgufArchitecture(
        "olmo2", interleaved_rope=False, configure=configure_llama, parts=GGUF_NORMS_AROUND, qk_norms=True
    ),
)
