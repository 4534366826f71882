"""LFM 2: short convolutions between layers of attention, whose queries and keys have norms."""

from typing import Any

from edgerazor.families.core.base import (
    LFM2_LINEARS,
    LFM2_NORMS,
    SHORT_CONVOLUTION,
    Family,
    NativeArchitecture,
    convolution_or_attention,
)


def _intermediate_size(config: Any) -> int:
    """As in `Lfm2MLP`: two thirds, times a factor, up to the next multiple."""
    size: int = config.intermediate_size
    if config.block_auto_adjust_ff_dim:
        size = int(2 * size / 3)
        if config.block_ffn_dim_multiplier is not None:
            size = int(config.block_ffn_dim_multiplier * size)
            size = -(-size // config.block_multiple_of) * config.block_multiple_of
    return size


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
)
