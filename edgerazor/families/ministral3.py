"""Ministral 3, text: Mistral whose queries grow a little with their position, so that long contexts stay in focus."""

from typing import Any

from edgerazor.families.core.base import (
    Family,
    GgufArchitecture,
    GgufMetadata,
    GgufValue,
    NativeArchitecture,
    rms_epsilon,
    rope_as_configured,
    window_of_all,
)


def _query_scaling(config: Any) -> tuple[float, int]:
    rope = config.rope_parameters
    return rope["llama_4_scaling_beta"], rope["original_max_position_embeddings"]


def _unsupported(config: Any) -> str:
    beta = config.rope_parameters.get("llama_4_scaling_beta")
    return "" if isinstance(beta, int | float) else "queries without llama_4_scaling_beta"


def _configure(get: GgufMetadata) -> dict[str, Any]:
    rope = get.rope_parameters()
    rope["original_max_position_embeddings"] = get.number("rope.scaling.original_context_length")
    rope["llama_4_scaling_beta"] = get.decimal("attention.temperature_scale")
    if get.has("rope.scaling.yarn_log_multiplier"):
        rope |= {"mscale": 1.0, "mscale_all_dim": get.decimal("rope.scaling.yarn_log_multiplier")}
    return {**rms_epsilon(get), "rope_parameters": rope, "sliding_window": None}


def _metadata(config: dict[str, Any]) -> dict[str, GgufValue]:
    """What makes queries grow, and the factor of attention that goes with YaRN."""
    rope = config["rope_parameters"]
    said: dict[str, GgufValue] = {
        "attention.temperature_scale": float(rope["llama_4_scaling_beta"]),
        "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
    }
    if rope.get("mscale_all_dim"):
        said["rope.scaling.yarn_log_multiplier"] = float(rope["mscale_all_dim"])
    return said


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """The factors of YaRN's attention are in the metadata."""
    parameters = rope_as_configured(config)
    return {name: value for name, value in parameters.items() if name not in ("mscale", "mscale_all_dim")}


def _gguf_unsupported(config: dict[str, Any]) -> str:
    """llama.cpp's code takes `mscale` to be 1."""
    rope = config["rope_parameters"]
    if not isinstance(rope.get("llama_4_scaling_beta"), int | float):
        return "it has queries without llama_4_scaling_beta"
    scales = (rope.get("mscale"), rope.get("mscale_all_dim"))
    if scales != (None, None) and (scales[0] != 1 or not scales[1]):
        return "its YaRN scaling has an mscale that is not 1"
    return ""


FAMILY = Family(
    native=NativeArchitecture(
        "Ministral3RotaryEmbedding",
        query_scaling=_query_scaling,
        window=window_of_all,
        unsupported=_unsupported,
    ),
    gguf=GgufArchitecture(
        "mistral3",
        interleaved_rope=True,
        configure=_configure,
        metadata=_metadata,
        rope=_rope,
        all_layers_slide=True,
        unsupported=_gguf_unsupported,
    ),
)
