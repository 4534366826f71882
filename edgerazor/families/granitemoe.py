"""Granite 3 as a mixture of experts, with its four factors of attention scores, embeddings, residuals and logits."""

from edgerazor.families.core.base import Family, GgufArchitecture

FAMILY = Family(
    gguf=GgufArchitecture(
        "granitemoe",
        interleaved_rope=True,
        experts=True,
        factors={
            "attention_multiplier": "attention.scale",
            "embedding_multiplier": "embedding_scale",
            "residual_multiplier": "residual_scale",
            "logits_scaling": "logit_scale",
        },
    )
)
