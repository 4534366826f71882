"""Qwen 3.5, text: three layers with the gated delta rule for each one with attention, whose result has a gate."""

from typing import Any

from edgerazor.families.core.base import (
    GATED_DELTA_RULE,
    NORMS_BEFORE,
    QK_NORMS,
    Family,
    Mixer,
    NativeArchitecture,
    attention_bias,
)


def _mixer(config: Any, layer: int) -> Mixer:
    return "gated_delta_rule" if config.layer_types[layer] == "linear_attention" else "attention"


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
)
