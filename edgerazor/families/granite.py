"""Granite 3: Llama with four factors, of attention scores, embeddings, residuals and logits."""

from typing import Any

from edgerazor.families.core.base import Family, GgufArchitecture, GgufMetadata, configure_llama


def _configure(get: GgufMetadata) -> dict[str, Any]:
    keys = {"attention_multiplier": "attention.scale", "embedding_multiplier": "embedding_scale"}
    keys |= {"residual_multiplier": "residual_scale", "logits_scaling": "logit_scale"}
    factors = {field: get.decimal(key) for field, key in keys.items() if get.has(key)}
    factors.setdefault("attention_multiplier", get.head_size() ** -0.5)
    return {**configure_llama(get), **factors}


FAMILY = Family(gguf=GgufArchitecture("granite", interleaved_rope=True, configure=_configure, exported=False))
