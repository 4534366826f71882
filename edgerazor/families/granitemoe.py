"""Granite 3 as a mixture of experts, with its four factors of attention scores, embeddings, residuals and logits."""

from typing import Any

from edgerazor.families.core.base import (
    GRANITE_FACTORS,
    Experts,
    Family,
    GgufArchitecture,
    NativeArchitecture,
    attention_bias,
    attention_multiplier,
    embedding_multiplier,
    over_logits_scaling,
    residual_multiplier,
    scale_keys,
)


def _experts(config: Any, layer: int) -> Experts:
    """The softmax is over the chosen experts."""
    return Experts(
        "block_sparse_moe.experts",
        "block_sparse_moe.router",
        config.num_local_experts,
        config.num_experts_per_tok,
        config.intermediate_size,
        normalized=True,
    )


FAMILY = Family(
    native=NativeArchitecture(
        "GraniteMoeRotaryEmbedding",
        experts=_experts,
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        attention_scale=attention_multiplier,
        embedding_scale=embedding_multiplier,
        residual_scale=residual_multiplier,
        logit_scale=over_logits_scaling,
    ),
    gguf=GgufArchitecture("granitemoe", interleaved_rope=True, experts=True, metadata=scale_keys(GRANITE_FACTORS)),
)
