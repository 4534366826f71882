"""OLMo 1: LayerNorm without parameters; its option to clip queries, keys and values is not computed natively."""

from typing import Any

from edgerazor.families.core.base import Family, NativeArchitecture, attention_bias


def _unsupported(config: Any) -> str:
    return "" if config.clip_qkv is None else "queries, keys and values that are cut off"


FAMILY = Family(
    native=NativeArchitecture(
        "OlmoRotaryEmbedding",
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        norm_kind="layer",
        norm_epsilon=1e-5,
        norm_parameters=(),
        unsupported=_unsupported,
    )
)
