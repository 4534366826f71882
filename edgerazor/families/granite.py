"""Granite 3: Llama with four factors, of attention scores, embeddings, residuals and logits."""

from typing import Any

from edgerazor.families.core.base import (
    GGUF_ALL_BIASES,
    GRANITE_FACTORS,
    Family,
    GgufArchitecture,
    GgufMetadata,
    NativeArchitecture,
    attention_bias,
    attention_multiplier,
    configure_llama,
    embedding_multiplier,
    mlp_bias,
    over_logits_scaling,
    residual_multiplier,
    scale_keys,
)


def _configure(get: GgufMetadata) -> dict[str, Any]:
    factors = {setting: get.decimal(key) for key, setting in GRANITE_FACTORS.items() if get.has(key)}
    factors.setdefault("attention_multiplier", get.head_size() ** -0.5)
    return {**configure_llama(get), **factors}


FAMILY = Family(
    native=NativeArchitecture(
        "GraniteRotaryEmbedding",
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        mlp_bias=mlp_bias,
        attention_scale=attention_multiplier,
        embedding_scale=embedding_multiplier,
        residual_scale=residual_multiplier,
        logit_scale=over_logits_scaling,
    ),
    gguf=GgufArchitecture(
        "granite",
        interleaved_rope=True,
        configure=_configure,
        metadata=scale_keys(GRANITE_FACTORS),
        biases=GGUF_ALL_BIASES,
    ),
)
