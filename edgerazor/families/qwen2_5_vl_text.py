"""Qwen 2.5 VL's decoder: Qwen 2.5, whose positions of pictures have three dimensions."""

from edgerazor.families.core.base import Family, NativeArchitecture, always, window_by_layer_type

FAMILY = Family(
    native=NativeArchitecture("Qwen2_5_VLRotaryEmbedding", qkv_bias=always, window=window_by_layer_type),
)
