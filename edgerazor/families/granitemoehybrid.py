"""Granite 4: Mamba-2 layers between those of attention, often without positions; an MLP, or experts beside it."""

import math
from dataclasses import replace
from typing import Any

from edgerazor.families.core.base import (
    ATTENTION,
    GRANITE_FACTORS,
    MAMBA2,
    Experts,
    Family,
    GgufArchitecture,
    GgufValue,
    Mixer,
    NativeArchitecture,
    attention_bias,
    attention_multiplier,
    embedding_multiplier,
    over_logits_scaling,
    residual_multiplier,
    scale_keys,
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


# GGUF -----------------------------------------------------------------------------------------------------------------


def _metadata(config: dict[str, Any]) -> dict[str, GgufValue]:
    """Whether there are positions is what llama.cpp reads of `finetuned`."""
    of_mlp = "expert_shared_feed_forward_length" if config["num_local_experts"] else "feed_forward_length"
    return {
        **scale_keys(GRANITE_FACTORS)(config),
        "rope.scaling.finetuned": config["position_embedding_type"] == "rope",
        of_mlp: config["shared_intermediate_size"],
    }


def _hybrid_metadata(config: dict[str, Any]) -> dict[str, GgufValue]:
    """Layers of Mamba-2 have no heads of keys."""
    heads = config["num_key_value_heads"]
    return {
        **_metadata(config),
        "attention.head_count_kv": [0 if kind == "linear_attention" else heads for kind in config["layer_types"]],
        "ssm.conv_kernel": config["mamba_d_conv"],
        "ssm.state_size": config["mamba_d_state"],
        "ssm.group_count": config["mamba_n_groups"],
        "ssm.inner_size": config["mamba_n_heads"] * config["mamba_d_head"],
        "ssm.time_step_rank": config["mamba_n_heads"],
    }


def _instead(config: dict[str, Any]) -> GgufArchitecture | None:
    """Without Mamba-2 it is Granite 3, of which a mixture may have an MLP beside its experts."""
    experts = bool(config["num_local_experts"])
    if "linear_attention" not in config["layer_types"]:
        return MIXTURE if experts else DENSE
    return HYBRID_MIXTURE if experts else None


def _mixture_unsupported(config: dict[str, Any]) -> str:
    """Without Mamba-2, llama.cpp gives a mixture positions."""
    return "" if config["position_embedding_type"] == "rope" else "it has no positions, and llama.cpp's granitemoe has"


def _gguf_unsupported(config: dict[str, Any]) -> str:
    """What llama.cpp's code takes for granted of Mamba-2."""
    if config["mamba_expand"] != 2:
        return "its Mamba-2 layers are not twice as wide as the model"
    if config["mamba_n_groups"] != 1:
        return "the heads of its Mamba-2 layers are in groups"
    if config["mamba_proj_bias"] or not config["mamba_conv_bias"]:
        return "its Mamba-2 layers have biases of projections, or none of convolutions"
    steps = tuple(config["time_step_limit"] or (0.0, math.inf))
    return "" if steps == (0.0, math.inf) else "its time steps have bounds"


DENSE = GgufArchitecture(
    "granite",
    interleaved_rope=True,
    halves={"shared_mlp.input_linear": ("ffn_gate", "ffn_up")},
    parts={"shared_mlp.output_linear": "ffn_down"},
    metadata=_metadata,
)
HYBRID = replace(
    DENSE,
    name="granitehybrid",
    instead=_instead,
    parameters={"mamba.A_log": "ssm_a", "mamba.D": "ssm_d", "mamba.dt_bias": "ssm_dt.bias"},
    decays=frozenset({"mamba.A_log"}),
    upright=frozenset({"mamba.A_log", "mamba.D"}),
    biases=frozenset({"ssm_conv1d"}),
    parts={
        **{**DENSE.parts, "mamba.in_proj": "ssm_in", "mamba.conv1d": "ssm_conv1d", "mamba.norm": "ssm_norm"},
        "mamba.out_proj": "ssm_out",
    },
    metadata=_hybrid_metadata,
    unsupported=_gguf_unsupported,
)


def _with_experts(architecture: GgufArchitecture, name: str) -> GgufArchitecture:
    """The MLP is one that all tokens share."""
    parts = {**architecture.parts, "shared_mlp.output_linear": "ffn_down_shexp"}
    halves = {"shared_mlp.input_linear": ("ffn_gate_shexp", "ffn_up_shexp")}
    return replace(architecture, name=name, experts=True, halves=halves, parts=parts)


MIXTURE = replace(_with_experts(DENSE, "granitemoe"), unsupported=_mixture_unsupported)
HYBRID_MIXTURE = _with_experts(HYBRID, "granitehybrid")

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
    gguf=HYBRID,
)
