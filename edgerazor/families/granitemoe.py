"""Granite 3 as a mixture of experts, with its four factors of attention scores, embeddings, residuals and logits."""

from edgerazor.families.core.base import GRANITE_FACTORS, Family, GgufArchitecture, scale_keys

FAMILY = Family(
    gguf=GgufArchitecture("granitemoe", interleaved_rope=True, experts=True, metadata=scale_keys(GRANITE_FACTORS))
)
