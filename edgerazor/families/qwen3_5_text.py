"""Qwen 3.5, text: three layers with the gated delta rule for each one with attention, whose result has a gate."""

from typing import Any

from edgerazor.families.core.base import (
    GATED_DELTA_RULE,
    NORMS_BEFORE,
    QK_NORMS,
    Family,
    GgufArchitecture,
    GgufMetadata,
    GgufValue,
    Mixer,
    NativeArchitecture,
    attention_bias,
    rms_epsilon,
)


def _mixer(config: Any, layer: int) -> Mixer:
    return "gated_delta_rule" if config.layer_types[layer] == "linear_attention" else "attention"


def _configure(get: GgufMetadata) -> dict[str, Any]:
    layers = get.number("block_count")
    recurrent = get.value("attention.recurrent_layers", [])
    if not recurrent:
        every = get.number("full_attention_interval", 4)
        recurrent = [(layer + 1) % every != 0 for layer in range(layers)]
    if not isinstance(recurrent, list) or len(recurrent) < layers:
        raise get.damaged("its recurrent layers are not given for each layer")
    heads, width = get.number("ssm.time_step_rank"), get.number("ssm.state_size")
    rope = get.rope_parameters()
    rope["partial_rotary_factor"] = get.number("rope.dimension_count") / get.head_size()
    return {
        **rms_epsilon(get),
        "attention_bias": False,
        "layer_types": ["linear_attention" if here else "full_attention" for here in recurrent[:layers]],
        "linear_conv_kernel_dim": get.number("ssm.conv_kernel"),
        "linear_num_key_heads": get.number("ssm.group_count"),
        "linear_num_value_heads": heads,
        "linear_key_head_dim": width,
        "linear_value_head_dim": get.number("ssm.inner_size") // heads,
        "rope_parameters": rope,
    }


def _metadata(config: dict[str, Any]) -> dict[str, GgufValue]:
    """Sizes of the recurrent layers, and which they are. Sections of positions matter to pictures alone."""
    recurrent = [kind == "linear_attention" for kind in config["layer_types"]]
    said: dict[str, GgufValue] = {
        "attention.recurrent_layers": recurrent,
        "rope.dimension_sections": [*config["rope_parameters"].get("mrope_section", [11, 11, 10]), 0],
        "ssm.conv_kernel": config["linear_conv_kernel_dim"],
        "ssm.state_size": config["linear_key_head_dim"],
        "ssm.group_count": config["linear_num_key_heads"],
        "ssm.time_step_rank": config["linear_num_value_heads"],
        "ssm.inner_size": config["linear_value_head_dim"] * config["linear_num_value_heads"],
    }
    if False in recurrent:  # older versions of llama.cpp know regular layers alone
        every = recurrent.index(False) + 1
        if recurrent == [(layer + 1) % every != 0 for layer in range(len(recurrent))]:
            said["full_attention_interval"] = every
    return said


def _value_heads(config: dict[str, Any], width: int) -> list[int]:
    """Rows of value heads in llama.cpp's order: the first of each key head, then the second of each, and so on."""
    keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
    heads = [key * (values // keys) + of_key for of_key in range(values // keys) for key in range(keys)]
    return [head * width + row for head in heads for row in range(width)]


def _row_orders(config: dict[str, Any]) -> dict[str, list[int]]:
    if config["linear_num_value_heads"] == config["linear_num_key_heads"]:
        return {}
    single, rows = _value_heads(config, 1), _value_heads(config, config["linear_value_head_dim"])
    others = 2 * config["linear_num_key_heads"] * config["linear_key_head_dim"]  # of queries and keys
    mixed = [*range(others), *(others + row for row in rows)]
    return {
        **{"attn_qkv": mixed, "ssm_conv1d": mixed, "attn_gate": rows},
        **dict.fromkeys(("ssm_alpha", "ssm_beta", "ssm_a", "ssm_dt"), single),
    }


def _column_orders(config: dict[str, Any]) -> dict[str, list[int]]:
    if config["linear_num_value_heads"] == config["linear_num_key_heads"]:
        return {}
    return {"ssm_out": _value_heads(config, config["linear_value_head_dim"])}


def _gguf_unsupported(config: dict[str, Any]) -> str:
    """llama.cpp's code has value heads as wide as key heads."""
    same = config["linear_value_head_dim"] == config["linear_key_head_dim"]
    return "" if same else "its value heads are not as wide as its key heads"


FAMILY = Family(
    native=NativeArchitecture(
        "Qwen3_5TextRotaryEmbedding",
        mixer=_mixer,
        mixers={"gated_delta_rule": GATED_DELTA_RULE},
        gated_queries=True,
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        norms={**NORMS_BEFORE, **QK_NORMS},
        norm_offset=1.0,
    ),
    gguf=GgufArchitecture(
        "qwen35",
        interleaved_rope=False,
        configure=_configure,
        norm_offset=1.0,
        whole_norms=frozenset({"linear_attn.norm"}),
        parameters={"linear_attn.A_log": "ssm_a", "linear_attn.dt_bias": "ssm_dt.bias"},
        decays=frozenset({"linear_attn.A_log"}),
        row_orders=_row_orders,
        column_orders=_column_orders,
        partial_rope=True,
        parts={
            **{"post_attention_layernorm": "post_attention_norm", "linear_attn.in_proj_qkv": "attn_qkv"},
            **{"linear_attn.in_proj_z": "attn_gate", "linear_attn.in_proj_b": "ssm_beta"},
            **{"linear_attn.in_proj_a": "ssm_alpha", "linear_attn.conv1d": "ssm_conv1d"},
            **{"linear_attn.norm": "ssm_norm", "linear_attn.out_proj": "ssm_out"},
        },
        metadata=_metadata,
        qk_norms=True,
        unsupported=_gguf_unsupported,
    ),
)
