"""StarCoder 2: LayerNorm, biases, and an MLP without a gate."""

from typing import Any

from edgerazor.families.core.base import ATTENTION, Family, NativeArchitecture, window_of_all


def _use_bias(config: Any) -> bool:
    return bool(config.use_bias)


FAMILY = Family(
    native=NativeArchitecture(
        "Starcoder2RotaryEmbedding",
        linears={**ATTENTION, "up": "mlp.c_fc", "down": "mlp.c_proj"},
        qkv_bias=_use_bias,
        o_bias=_use_bias,
        mlp_bias=_use_bias,
        norm_kind="layer",
        norm_epsilon="norm_epsilon",
        norm_parameters=("weight", "bias"),
        window=window_of_all,
    ),
)
