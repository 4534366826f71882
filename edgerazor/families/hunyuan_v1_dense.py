"""Hunyuan dense (0.5B to 7B): Llama with a norm of each head's queries and keys, behind RoPE."""

from edgerazor.families.core.base import NORMS_BEFORE, Family, NativeArchitecture, attention_bias

FAMILY = Family(
    native=NativeArchitecture(
        "HunYuanDenseV1RotaryEmbedding",
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        norms={**NORMS_BEFORE, "q_norm": "self_attn.query_layernorm", "k_norm": "self_attn.key_layernorm"},
        norm_after_rope=True,
    ),
)
