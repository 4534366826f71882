"""Gemma 2: every second layer sees a window, and logits and scores are capped; 27B scales scores by its width."""

from typing import Any

from edgerazor.families.core.base import Family, GgufArchitecture, GgufMetadata, configure_gemma, gemma_query_scalar


def _configure(get: GgufMetadata) -> dict[str, Any]:
    caps = ("attn_logit_softcapping", "final_logit_softcapping")
    return {
        **configure_gemma(get),
        **{key: get.decimal(key, 0.0) if get.value(key, 0.0) else None for key in caps},
        "sliding_window": get.number("attention.sliding_window", 4096),
        "layer_types": get.layer_types(2),
        "query_pre_attn_scalar": gemma_query_scalar(get, get.number("block_count") == 46),
    }


FAMILY = Family(
    gguf=GgufArchitecture(
        "gemma2", interleaved_rope=False, configure=_configure, norm_offset=1.0, float16=False, exported=False
    )
)
