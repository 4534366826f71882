"""LFM 3: LFM 2 with norms behind mixers and MLP, a gate for each head, windows, and positions by kind of layer."""

from typing import Any

from edgerazor.families.core.base import (
    ATTENTION,
    QK_NORMS,
    SHORT_CONVOLUTION,
    Family,
    NativeArchitecture,
    attention_bias,
    convolution_or_attention,
    rope_by_layer_type,
    window_by_layer_type,
)


def _unsupported(config: Any) -> str:
    if not config.use_attention_gate:
        return "LFM 3 without gates of attention"
    return "" if config.use_sandwich_norm else "LFM 3 without norms behind its layers"


FAMILY = Family(
    native=NativeArchitecture(
        "Lfm3RotaryEmbedding",
        linears={
            **ATTENTION,
            **{"attention_gate": "self_attn.g_proj", "gate": "feed_forward.w1"},
            **{"up": "feed_forward.w3", "down": "feed_forward.w2"},
        },
        mixer=convolution_or_attention,
        mixers={"short_convolution": SHORT_CONVOLUTION},
        activation=lambda config: "silu",
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        norms={
            **{"before_attention": "operator_norm", "after_attention": "post_operator_norm"},
            **{"before_mlp": "ffn_norm", "after_mlp": "post_ffn_norm"},
            **QK_NORMS,
        },
        final_norm="model.embedding_norm",
        norm_epsilon="norm_eps",
        rope_table=rope_by_layer_type,
        window=window_by_layer_type,
        unsupported=_unsupported,
    ),
)
