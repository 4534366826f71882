"""OLMo 1: LayerNorm without parameters; its option to clip queries, keys and values is not computed natively."""

from typing import Any

from edgerazor.families.core.base import Family, GgufArchitecture, GgufMetadata, NativeArchitecture, attention_bias


def _unsupported(config: Any) -> str:
    return "" if config.clip_qkv is None else "queries, keys and values that are cut off"


def _configure(get: GgufMetadata) -> dict[str, Any]:
    """The norms have one epsilon for all models, which the configuration does not have."""
    if get.decimal("attention.layer_norm_epsilon", 1e-5) != 1e-5:
        raise get.damaged("its norms have another epsilon than OLMo's 1e-5")
    clipped = get.decimal("attention.clamp_kqv") if get.value("attention.clamp_kqv", 0.0) else None
    return {"clip_qkv": clipped, "rope_parameters": get.rope_parameters()}


FAMILY = Family(
    native=NativeArchitecture(
        "OlmoRotaryEmbedding",
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        norm_kind="layer",
        norm_epsilon=1e-5,
        norm_parameters=(),
        unsupported=_unsupported,
    ),
    gguf=GgufArchitecture("olmo", interleaved_rope=True, configure=_configure, exported=False),
)
