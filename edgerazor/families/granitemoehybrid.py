"""Granite 4: Mamba-2 layers between those of attention, often without positions; an MLP, or experts beside it."""

from typing import Any

from edgerazor.families.core.base import (
    ATTENTION,
    MAMBA2,
    Experts,
    Family,
    Mixer,
    NativeArchitecture,
    attention_bias,
    attention_multiplier,
    embedding_multiplier,
    over_logits_scaling,
    residual_multiplier,
)


def _mixer(config: Any, layer: int) -> Mixer:
    return "mamba2" if config.layer_types[layer] == "linear_attention" else "attention"


def _has_rope(config: Any, layer: int) -> bool:
    return bool(config.position_embedding_type == "rope")


def _experts(config: Any, layer: int) -> Experts | None:
    """The softmax is over the chosen experts, and the MLP is one that all tokens share."""
    if not config.num_local_experts:
        return None
    return Experts(
        "block_sparse_moe.experts",
        "block_sparse_moe.router",
        config.num_local_experts,
        config.num_experts_per_tok,
        config.intermediate_size,
        normalized=True,
        beside_mlp=True,
    )


FAMILY = Family(
    native=NativeArchitecture(
        "GraniteMoeHybridRotaryEmbedding",
        linears={**ATTENTION, "gate_up": "shared_mlp.input_linear", "down": "shared_mlp.output_linear"},
        mixer=_mixer,
        mixers={"mamba2": MAMBA2},
        experts=_experts,
        intermediate_size=lambda config, layer: int(config.shared_intermediate_size),
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        has_rope=_has_rope,
        attention_scale=attention_multiplier,
        embedding_scale=embedding_multiplier,
        residual_scale=residual_multiplier,
        logit_scale=over_logits_scaling,
    ),
)
