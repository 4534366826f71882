"""Ministral 3, text: Mistral whose queries grow a little with their position, so that long contexts stay in focus."""

from typing import Any

from edgerazor.families.core.base import Family, NativeArchitecture, window_of_all


def _query_scaling(config: Any) -> tuple[float, int]:
    rope = config.rope_parameters
    return rope["llama_4_scaling_beta"], rope["original_max_position_embeddings"]


def _unsupported(config: Any) -> str:
    beta = config.rope_parameters.get("llama_4_scaling_beta")
    return "" if isinstance(beta, int | float) else "queries without llama_4_scaling_beta"


FAMILY = Family(
    native=NativeArchitecture(
        "Ministral3RotaryEmbedding",
        query_scaling=_query_scaling,
        window=window_of_all,
        unsupported=_unsupported,
    ),
)
