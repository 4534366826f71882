"""StableLM 2: LayerNorm with weight and bias, RoPE on a part of each head."""

from typing import Any

from edgerazor.families.core.base import Family, GgufArchitecture, GgufMetadata, NativeArchitecture


def _qkv_bias(config: Any) -> bool:
    return bool(config.use_qkv_bias)


def _unsupported(config: Any) -> str:
    if config.use_parallel_residual:
        return "attention and MLP side by side"
    return "norms of its own for each head" if config.qk_layernorm else ""


def _configure(get: GgufMetadata) -> dict[str, Any]:
    size = get.head_size()
    part = get.number("rope.dimension_count", size) / size
    return {
        "layer_norm_eps": get.decimal("attention.layer_norm_epsilon", 1e-5),
        "use_qkv_bias": get.has_tensor("blk.0.attn_q.bias"),
        "use_parallel_residual": False,
        "qk_layernorm": False,
        "partial_rotary_factor": part,
        "rope_parameters": {**get.rope_parameters(), "partial_rotary_factor": part},
    }


FAMILY = Family(
    native=NativeArchitecture(
        "StableLmRotaryEmbedding",
        qkv_bias=_qkv_bias,
        norm_kind="layer",
        norm_epsilon="layer_norm_eps",
        norm_parameters=("weight", "bias"),
        unsupported=_unsupported,
    ),
    gguf=GgufArchitecture("stablelm", interleaved_rope=False, configure=_configure, partial_rope=True, exported=False),
)
