"""Gemma 4, text: inputs of single layers, keys and values of earlier layers, heads of two widths, norms of values."""

from typing import Any

from edgerazor.families.core.base import (
    GGUF_NORMS_AROUND,
    NORMS_AROUND,
    QK_NORMS,
    Experts,
    Family,
    GgufArchitecture,
    GgufMetadata,
    GgufValue,
    KvHeads,
    LayerInputs,
    NativeArchitecture,
    attention_bias,
    final_soft_cap,
    hidden_activation,
    looks_ahead_in_gguf,
    one,
    rms_epsilon,
    root_of_width,
    rope_by_layer_type,
    window_by_layer_type,
)

#: What llama.cpp divides the frequencies of positions by that are not rotated, and the tensor that says so.
GGUF_STILL, GGUF_FACTORS = 1e30, "rope_freqs.weight"


def _kv_heads(config: Any, layer: int) -> KvHeads:
    of_layer = config.per_layer_config[layer]
    return KvHeads(int(of_layer.num_key_value_heads), int(of_layer.head_dim))


def _kv_source(config: Any, layer: int) -> int | None:
    """The last layer of the same kind that has keys and values of its own."""
    first = config.num_hidden_layers - config.num_kv_shared_layers
    if layer < first:
        return None
    return max(earlier for earlier in range(first) if config.layer_types[earlier] == config.layer_types[layer])


def _values_are_keys(config: Any, layer: int) -> bool:
    return bool(config.attention_k_eq_v) and config.layer_types[layer] != "sliding_attention"


def _intermediate_size(config: Any, layer: int) -> int:
    wide = config.use_double_wide_mlp and _kv_source(config, layer) is not None
    return int(config.intermediate_size) * (2 if wide else 1)


def _layer_inputs(config: Any) -> LayerInputs | None:
    features = config.hidden_size_per_layer_input
    if not features:
        return None
    return LayerInputs(
        features=int(features),
        table="model.embed_tokens_per_layer",
        projection="model.per_layer_model_projection",
        norm="model.per_layer_projection_norm",
        table_scale=float(features**0.5),
        projection_scale=float(config.hidden_size**-0.5),
        scale=float(2.0**-0.5),
        gate="per_layer_input_gate",
        o="per_layer_projection",
    )


def _experts(config: Any, layer: int) -> Experts | None:
    if not config.enable_moe_block:
        return None
    return Experts(
        "experts",
        "router.proj",
        config.num_experts,
        config.top_k_experts,
        config.moe_intermediate_size,
        normalized=True,
        factors="router.per_expert_scale",
        beside_mlp=True,
        norms={
            **{"before": "pre_feedforward_layernorm_2", "after": "post_feedforward_layernorm_2"},
            "after_mlp_alone": "post_feedforward_layernorm_1",
        },
        router_gains="router.scale",
        router_scale=float(config.hidden_size**-0.5),
    )


def _unsupported(config: Any) -> str:
    if config.use_bidirectional_attention == "all":  # "vision" is of the tokens of pictures alone
        return "attention to later tokens"
    if config.num_kv_shared_layers >= config.num_hidden_layers:
        return "keys and values of another model"
    if config.hidden_size_per_layer_input and config.vocab_size_per_layer_input != config.vocab_size:
        return "inputs of layers for a part of the vocabulary"
    return ""


# GGUF -----------------------------------------------------------------------------------------------------------------


def _gguf_heads(config: dict[str, Any], kind: str) -> set[tuple[int, int]]:
    """Numbers and widths of heads of keys and values in the layers of a kind."""
    own = {int(layer): sizes for layer, sizes in (config.get("per_layer_config") or {}).items()}  # keys as "05"
    of_kind = (
        {**config, **own.get(layer, {})} for layer, of_layer in enumerate(config["layer_types"]) if of_layer == kind
    )
    return {(int(sizes["num_key_value_heads"]), int(sizes["head_dim"])) for sizes in of_kind}


def _gguf_layers(config: dict[str, Any]) -> tuple[tuple[int, int], tuple[int, int]]:
    """The same of those with a window, and of the others; there are some of both."""
    [windowed], [full] = (_gguf_heads(config, kind) for kind in ("sliding_attention", "full_attention"))
    return windowed, full


def _metadata(config: dict[str, Any]) -> dict[str, GgufValue]:
    (window_heads, window_width), (heads, width) = _gguf_layers(config)
    slides = [kind == "sliding_attention" for kind in config["layer_types"]]
    layers, shared, inner = len(slides), config["num_kv_shared_layers"], config["intermediate_size"]
    local = config["rope_parameters"]["sliding_attention"]
    values: dict[str, GgufValue] = {
        "attention.sliding_window": config["sliding_window"],
        "attention.sliding_window_pattern": slides,
        "attention.shared_kv_layers": shared,
        "attention.key_length": width,
        "attention.value_length": width,
        "attention.key_length_swa": window_width,
        "attention.value_length_swa": window_width,
        "rope.dimension_count": width,
        "rope.dimension_count_swa": window_width,
        "rope.freq_base_swa": float(local["rope_theta"]),
        "embedding_length_per_layer_input": config["hidden_size_per_layer_input"] or 0,
    }
    if heads != window_heads:
        values["attention.head_count_kv"] = [window_heads if here else heads for here in slides]
    if config["use_double_wide_mlp"]:
        values["feed_forward_length"] = [inner * (1 if layer < layers - shared else 2) for layer in range(layers)]
    if config.get("final_logit_softcapping"):
        values["final_logit_softcapping"] = float(config["final_logit_softcapping"])
    return values


def _gguf_rope(config: dict[str, Any]) -> dict[str, Any]:
    """Positions of layers without a window: the features that are not rotated have factors of their own."""
    return {"rope_type": "default", "rope_theta": config["rope_parameters"]["full_attention"]["rope_theta"]}


def _gguf_rope_factors(config: dict[str, Any]) -> dict[str, list[float]]:
    width = _gguf_layers(config)[1][1]
    rotated = int(width * config["rope_parameters"]["full_attention"].get("partial_rotary_factor", 1.0) / 2)
    return {GGUF_FACTORS: [1.0] * rotated + [GGUF_STILL] * (width // 2 - rotated)}


def _gguf_unsupported(config: dict[str, Any]) -> str:
    if config.get("use_bidirectional_attention") == "all":
        return looks_ahead_in_gguf(config)
    if config["enable_moe_block"]:
        return "it has experts beside an MLP"
    if any(len(_gguf_heads(config, kind)) != 1 for kind in ("sliding_attention", "full_attention")):
        return "its layers with a window, or those without, are not there or differ in their heads"
    rope = config["rope_parameters"]
    if (rope["sliding_attention"]["rope_type"], rope["full_attention"]["rope_type"]) != ("default", "proportional"):
        return "its positions are scaled"
    own = config["num_hidden_layers"] - config["num_kv_shared_layers"]
    if config["num_kv_shared_layers"] and config["layer_types"][:own][-2:] != ["sliding_attention", "full_attention"]:
        return "its last keys and values are not those of a layer with a window and one without"
    part = config["hidden_size_per_layer_input"] and config["vocab_size_per_layer_input"] != config["vocab_size"]
    return "inputs of its layers are for a part of the vocabulary" if part else ""


def _of_layers(get: GgufMetadata, key: str, layers: int) -> list[int]:
    """A size of each layer, or one of all."""
    value = get.value(key)
    if not isinstance(value, list):
        return [get.number(key)] * layers
    sizes = value[:layers]
    if len(sizes) < layers or not all(type(size) is int and 0 < size < 1 << 31 for size in sizes):
        raise get.damaged(f"it does not give {key} for each layer")
    return sizes


def _configure(get: GgufMetadata) -> dict[str, Any]:
    kinds, layers = get.layer_types(6), get.number("block_count")
    heads = _of_layers(get, "attention.head_count_kv", layers)
    inner = _of_layers(get, "feed_forward_length", layers)
    shared = get.number("attention.shared_kv_layers", 0, least=0)
    full = kinds.index("full_attention") if "full_attention" in kinds else 0
    windowed = kinds.index("sliding_attention") if "sliding_attention" in kinds else 0
    wide = inner[layers - 1] == 2 * inner[0] and shared > 0
    if inner != [inner[0] * (2 if wide and layer >= layers - shared else 1) for layer in range(layers)]:
        raise get.damaged("its MLPs are of other widths than those of Gemma 4")
    factors = get.rope_factors(GGUF_FACTORS)
    rotated = sum(factor == 1.0 for factor in factors) / max(len(factors), 1)
    local = {"rope_type": "default", "rope_theta": get.decimal("rope.freq_base_swa", 10000.0)}
    theta, features = get.decimal("rope.freq_base", 1e6), get.number("embedding_length_per_layer_input", 0, least=0)
    beyond = {"rope_type": "proportional", "rope_theta": theta, "partial_rotary_factor": rotated}
    of_full = {"head_dim": get.number("attention.key_length"), "num_key_value_heads": heads[full]}
    return {
        **rms_epsilon(get),
        "hidden_activation": "gelu_pytorch_tanh",
        "intermediate_size": inner[0],
        "num_key_value_heads": heads[windowed],
        "head_dim": get.number("attention.key_length_swa"),
        "per_layer_config": {str(i): of_full for i, kind in enumerate(kinds) if kind == "full_attention"},
        "attention_k_eq_v": not get.has_tensor(f"blk.{full}.attn_v.weight"),
        "num_kv_shared_layers": shared,
        "use_double_wide_mlp": wide,
        "hidden_size_per_layer_input": features,
        "vocab_size_per_layer_input": get.vocabulary(),
        "rope_parameters": {"full_attention": beyond, "sliding_attention": local},
        "sliding_window": get.number("attention.sliding_window"),
        "layer_types": kinds,
        "final_logit_softcapping": get.decimal("final_logit_softcapping")
        if get.has("final_logit_softcapping")
        else None,
    }


FAMILY = Family(
    native=NativeArchitecture(
        "Gemma4TextRotaryEmbedding",
        activation=hidden_activation,
        intermediate_size=_intermediate_size,
        experts=_experts,
        layer_inputs=_layer_inputs,
        kv_heads=_kv_heads,
        kv_source=_kv_source,
        values_are_keys=_values_are_keys,
        value_norm=True,
        output_scale="layer_scalar",
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        norms={**NORMS_AROUND, **QK_NORMS, "after_input": "post_per_layer_input_norm"},
        rope_table=rope_by_layer_type,
        window=window_by_layer_type,
        attention_scale=one,
        embedding_scale=root_of_width,
        logit_soft_cap=final_soft_cap,
        unsupported=_unsupported,
    ),
    gguf=GgufArchitecture(
        "gemma4",
        interleaved_rope=False,
        configure=_configure,
        float16=False,
        parameters={"layer_scalar": "layer_output_scale.weight"},
        parts={
            **GGUF_NORMS_AROUND,
            **{"per_layer_input_gate": "inp_gate", "per_layer_projection": "proj"},
            **{"post_per_layer_input_norm": "post_norm", "model.embed_tokens_per_layer": "per_layer_token_embd"},
            **{"model.per_layer_model_projection": "per_layer_model_proj"},
            "model.per_layer_projection_norm": "per_layer_proj_norm",
        },
        metadata=_metadata,
        activation="gelu_pytorch_tanh",
        qk_norms=True,
        rope=_gguf_rope,
        rope_factors=_gguf_rope_factors,
        windows=True,
        unsupported=_gguf_unsupported,
    ),
)
