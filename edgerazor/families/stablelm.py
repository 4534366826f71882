"""StableLM 2: LayerNorm with weight and bias, RoPE on a part of each head."""

from typing import Any

from edgerazor.families.core.base import Family, NativeArchitecture


def _qkv_bias(config: Any) -> bool:
    return bool(config.use_qkv_bias)


def _unsupported(config: Any) -> str:
    if config.use_parallel_residual:
        return "attention and MLP side by side"
    return "norms of its own for each head" if config.qk_layernorm else ""


FAMILY = Family(
    native=NativeArchitecture(
        "StableLmRotaryEmbedding",
        qkv_bias=_qkv_bias,
        norm_kind="layer",
        norm_epsilon="layer_norm_eps",
        norm_parameters=("weight", "bias"),
        unsupported=_unsupported,
    )
)
