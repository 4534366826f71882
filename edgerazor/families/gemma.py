"""Gemma 1: gains of norms are stored less one, embeddings are scaled by the root of their width."""

from edgerazor.families.core.base import Family, GgufArchitecture, configure_gemma

FAMILY = Family(
    gguf=GgufArchitecture(
        "gemma", interleaved_rope=False, configure=configure_gemma, norm_offset=1.0, float16=False, exported=False
    )
)
