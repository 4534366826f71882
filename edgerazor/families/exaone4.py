"""EXAONE 4: norms behind attention and MLP, and of each head; where there are windows, only their layers have RoPE."""

from typing import Any

from edgerazor.families.core.base import (
    GGUF_NORMS_AROUND,
    NORMS_AFTER,
    QK_NORMS,
    Family,
    GgufArchitecture,
    GgufMetadata,
    GgufValue,
    NativeArchitecture,
    every_nth_is_full,
    rms_epsilon,
    window_by_layer_type,
)

#: Layers of the one model (32B) whose windows llama.cpp's code knows; it takes others to have none.
LAYERS_WITH_WINDOWS = 64


def _has_rope(config: Any, layer: int) -> bool:
    return config.sliding_window is None or config.layer_types[layer] == "sliding_attention"


def _configure(get: GgufMetadata) -> dict[str, Any]:
    layers = get.number("block_count")
    if layers == LAYERS_WITH_WINDOWS:
        window = get.number("attention.sliding_window", 4096)
        windows = {"sliding_window": window, "sliding_window_pattern": 4, "layer_types": get.layer_types(4)}
    else:
        windows = {"sliding_window": None, "layer_types": ["full_attention"] * layers}
    return {**rms_epsilon(get), **windows, "rope_parameters": get.rope_parameters()}


def _metadata(config: dict[str, Any]) -> dict[str, GgufValue]:
    window = config["sliding_window"]
    return {} if window is None else {"attention.sliding_window": window}


def _gguf_unsupported(config: dict[str, Any]) -> str:
    has_windows = config["sliding_window"] is not None
    if (config["num_hidden_layers"] == LAYERS_WITH_WINDOWS) != has_windows:
        return f"llama.cpp takes it to have windows where it has {LAYERS_WITH_WINDOWS} layers, and only there"
    return every_nth_is_full(config, 4) if has_windows else ""


FAMILY = Family(
    native=NativeArchitecture(
        "Exaone4RotaryEmbedding",
        norms={**NORMS_AFTER, **QK_NORMS},
        has_rope=_has_rope,
        window=window_by_layer_type,
    ),
    gguf=GgufArchitecture(
        "exaone4",
        interleaved_rope=False,
        configure=_configure,
        parts=GGUF_NORMS_AROUND,
        metadata=_metadata,
        qk_norms=True,
        windows=True,
        unsupported=_gguf_unsupported,
    ),
)
