"""LFM 2 as a mixture of experts behind some dense layers: scores are sigmoids, and a bias is added to choose by."""

from typing import Any

from edgerazor.families.core.base import (
    LFM2_GGUF,
    LFM2_LINEARS,
    LFM2_NORMS,
    SHORT_CONVOLUTION,
    Experts,
    Family,
    GgufArchitecture,
    GgufValue,
    NativeArchitecture,
    convolution_or_attention,
    heads_are_narrow,
    lfm2_metadata,
)

#: llama.cpp's number of scores that are sigmoids.
SIGMOID = 2


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


def _metadata(config: dict[str, Any]) -> dict[str, GgufValue]:
    return {
        **lfm2_metadata(config),
        "leading_dense_block_count": config["num_dense_layers"],
        "expert_gating_func": SIGMOID,
    }


def _gguf_unsupported(config: dict[str, Any]) -> str:
    if not config["use_expert_bias"]:
        return "its experts are chosen without a bias"
    if not config["norm_topk_prob"] or config["routed_scaling_factor"] != 1.0:
        return "llama.cpp's lfm2moe normalizes the weights of a token's experts, and gives them no factor"
    return "its convolutions have biases" if config["conv_bias"] else heads_are_narrow(config)


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
    gguf=GgufArchitecture(
        "lfm2moe",
        interleaved_rope=False,
        parts=LFM2_GGUF,
        parameters={"feed_forward.expert_bias": "exp_probs_b.bias"},
        metadata=_metadata,
        qk_norms=True,
        experts=True,
        unsupported=_gguf_unsupported,
    ),
)
