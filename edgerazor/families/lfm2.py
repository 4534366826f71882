"""LFM 2: short convolutions between layers of attention, whose queries and keys have norms."""

from typing import Any

from edgerazor.families.core.base import (
    LFM2_GGUF,
    LFM2_LINEARS,
    LFM2_NORMS,
    SHORT_CONVOLUTION,
    Family,
    GgufArchitecture,
    GgufMetadata,
    GgufValue,
    NativeArchitecture,
    convolution_or_attention,
    heads_are_narrow,
    lfm2_metadata,
)


def _features(config: dict[str, Any]) -> int:
    """Features between the MLP's matrices, as in `Lfm2MLP`: two thirds, times a factor, up to the next multiple."""
    size: int = config["intermediate_size"]
    if config["block_auto_adjust_ff_dim"]:
        size = int(2 * size / 3)
        if config["block_ffn_dim_multiplier"] is not None:
            size = int(config["block_ffn_dim_multiplier"] * size)
            size = -(-size // config["block_multiple_of"]) * config["block_multiple_of"]
    return size


def _intermediate_size(config: Any, layer: int) -> int:
    return _features(vars(config))


def _configure(get: GgufMetadata) -> dict[str, Any]:
    """Layers without heads of keys are convolutions; the features of the MLP are as they are."""
    heads = get.value("attention.head_count_kv")
    if not isinstance(heads, list) or len(heads) < get.number("block_count") or not any(heads):
        raise get.damaged("its heads of keys are not given by layer")
    return {
        "norm_eps": get.decimal("attention.layer_norm_rms_epsilon"),
        "conv_L_cache": get.number("shortconv.l_cache", least=2),
        "conv_bias": False,
        "block_auto_adjust_ff_dim": False,
        "num_key_value_heads": max(heads),
        "layer_types": ["full_attention" if count else "conv" for count in heads[: get.number("block_count")]],
        "rope_parameters": get.rope_parameters(),
    }


def _metadata(config: dict[str, Any]) -> dict[str, GgufValue]:
    return {**lfm2_metadata(config), "feed_forward_length": _features(config)}


def _gguf_unsupported(config: dict[str, Any]) -> str:
    return "its convolutions have biases" if config["conv_bias"] else heads_are_narrow(config)


FAMILY = Family(
    native=NativeArchitecture(
        "Lfm2RotaryEmbedding",
        linears=LFM2_LINEARS,
        mixer=convolution_or_attention,
        mixers={"short_convolution": SHORT_CONVOLUTION},
        activation=lambda config: "silu",
        intermediate_size=_intermediate_size,
        norms=LFM2_NORMS,
        final_norm="model.embedding_norm",
        norm_epsilon="norm_eps",
    ),
    gguf=GgufArchitecture(
        "lfm2",
        interleaved_rope=False,
        configure=_configure,
        parts=LFM2_GGUF,
        metadata=_metadata,
        qk_norms=True,
        unsupported=_gguf_unsupported,
    ),
)
