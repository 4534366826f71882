"""Granite 4: Granite 3 whose MLP is the shared expert; native where layers have attention alone, and no experts."""

from typing import Any

from edgerazor.families.core.base import ATTENTION, Family, NativeArchitecture, attention_bias


def _has_rope(config: Any, layer: int) -> bool:
    return bool(config.position_embedding_type == "rope")


def _unsupported(config: Any) -> str:
    if "linear_attention" in config.layer_types:
        return "Mamba-2 layers"
    return "experts beside a shared one" if config.num_local_experts else ""


FAMILY = Family(
    native=NativeArchitecture(
        "GraniteMoeHybridRotaryEmbedding",
        linears={**ATTENTION, "gate_up": "shared_mlp.input_linear", "down": "shared_mlp.output_linear"},
        intermediate_size=lambda config, layer: int(config.shared_intermediate_size),
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        has_rope=_has_rope,
        attention_scale=lambda config: float(config.attention_multiplier),
        embedding_scale=lambda config: float(config.embedding_multiplier),
        residual_scale=lambda config: float(config.residual_multiplier),
        logit_scale=lambda config: 1.0 / config.logits_scaling,
        unsupported=_unsupported,
    ),
)
