"""SmolLM 3: Llama with layers that leave RoPE out (NoPE); some layers may see a sliding window."""

from typing import Any

from edgerazor.families.core.base import (
    GGUF_QKV_BIASES,
    Family,
    GgufArchitecture,
    GgufMetadata,
    NativeArchitecture,
    attention_bias,
    configure_llama,
    mlp_bias,
    window_by_layer_type,
)


def _has_rope(config: Any, layer: int) -> bool:
    return bool(config.no_rope_layers[layer])  # despite its name, the setting is 1 where a layer has RoPE


def _gguf_unsupported(config: dict[str, Any]) -> str:
    """llama.cpp's code leaves RoPE out of every fourth layer, whatever the configuration says."""
    expected = [int((layer + 1) % 4 != 0) for layer in range(config["num_hidden_layers"])]
    return "" if config.get("no_rope_layers") == expected else "its layers without positions are not every fourth one"


def _configure(get: GgufMetadata) -> dict[str, Any]:
    """Files do not say that every fourth layer has no positions."""
    return {**configure_llama(get), "no_rope_layer_interval": 4, "use_sliding_window": False}


FAMILY = Family(
    native=NativeArchitecture(
        "SmolLM3RotaryEmbedding",
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        mlp_bias=mlp_bias,
        has_rope=_has_rope,
        window=window_by_layer_type,
    ),
    gguf=GgufArchitecture(
        "smollm3",
        interleaved_rope=True,
        configure=_configure,
        biases=GGUF_QKV_BIASES,
        unsupported=_gguf_unsupported,
    ),
)
