"""LFM 2 as a mixture of experts behind some dense layers: scores are sigmoids, and a bias is added to choose by."""

from typing import Any

from edgerazor.families.core.base import (
    LFM2_LINEARS,
    LFM2_NORMS,
    SHORT_CONVOLUTION,
    Experts,
    Family,
    NativeArchitecture,
    convolution_or_attention,
)


def _experts(config: Any, layer: int) -> Experts | None:
    if layer < config.num_dense_layers:
        return None
    return Experts(
        "feed_forward.experts",
        "feed_forward.gate",
        config.num_experts,
        config.num_experts_per_tok,
        config.moe_intermediate_size,
        scores="sigmoid",
        normalized=config.norm_topk_prob,
        epsilon=1e-6 if config.norm_topk_prob else 0.0,
        scale=config.routed_scaling_factor,
        choice_bias="feed_forward.expert_bias" if config.use_expert_bias else "",
    )


FAMILY = Family(
    native=NativeArchitecture(
        "Lfm2MoeRotaryEmbedding",
        linears=LFM2_LINEARS,
        mixer=convolution_or_attention,
        mixers={"short_convolution": SHORT_CONVOLUTION},
        experts=_experts,
        activation=lambda config: "silu",
        norms=LFM2_NORMS,
        final_norm="model.embedding_norm",
        norm_epsilon="norm_eps",
    ),
)
