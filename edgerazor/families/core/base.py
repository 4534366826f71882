"""What has to be known of an architecture, and the names of a decoder's tensors.

Most open language models are the same decoder with small differences: which linear layers have biases, which norms
there are and where they stand, whether a layer sees a sliding window or applies RoPE. A `Family` lists the differences
twice, once for each program that computes the model from code of its own:

- `NativeArchitecture` for our C++ decoder (`runtime/network.py`), after `modeling_*.py` of transformers;
- `GgufArchitecture` for llama.cpp (`exporters/gguf.py`, `importers/gguf.py`), after `src/models/*.cpp` of llama.cpp.

Either is None where that program does not compute the architecture. Sizes are never in a family: they come from the
configuration. Tensors are named as in a checkpoint of transformers.

This room knows names and facts of configurations only; it imports neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens", "lm_head", "model.norm"
#: Linear layers of a decoder layer, in the order in which a token meets them.
LINEARS = {
    **{name: f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")},
    **{name: f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}
#: Norms of a decoder layer: place in the native decoder's `Layer` -> name in a checkpoint. Norms before attention and
#: MLP (Llama), norms behind both (OLMo 2), and norms of queries and keys.
NORMS_BEFORE = {"before_attention": "input_layernorm", "before_mlp": "post_attention_layernorm"}
NORMS_AFTER = {"after_attention": "post_attention_layernorm", "after_mlp": "post_feedforward_layernorm"}
QK_NORMS = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}

#: llama.cpp's names of the parts of a decoder layer whose biases it reads, as one of these sets.
GGUF_QKV_BIASES = frozenset({"attn_q", "attn_k", "attn_v"})
GGUF_ALL_BIASES = GGUF_QKV_BIASES | {"attn_output", "ffn_gate", "ffn_up", "ffn_down"}
#: Ways to scale rotary positions (`rope_type`) that every architecture of llama.cpp knows.
GGUF_ROPE_TYPES = frozenset({"default", "linear", "yarn"})


def never(config: Any) -> bool:
    """No linear layer of that kind has a bias."""
    return False


def always(config: Any) -> bool:
    """Every linear layer of that kind has a bias."""
    return True


def attention_bias(config: Any) -> bool:
    """Biases as the setting `attention_bias` says."""
    return bool(config.attention_bias)


def mlp_bias(config: Any) -> bool:
    """Biases as the setting `mlp_bias` says."""
    return bool(config.mlp_bias)


def every_layer(config: Any, layer: int) -> bool:
    """Every decoder layer applies RoPE."""
    return True


def no_window(config: Any, layer: int) -> int | None:
    """Every decoder layer attends to all tokens before."""
    return None


def window_by_layer_type(config: Any, layer: int) -> int | None:
    """Layers that `layer_types` calls `sliding_attention` see a window of `sliding_window` tokens."""
    return config.sliding_window if config.layer_types[layer] == "sliding_attention" else None


def all_supported(config: Any) -> str:
    """No setting of the configuration is beyond what the program computes."""
    return ""


@dataclass(frozen=True)
class NativeArchitecture:
    """What the native decoder has to know. Functions get the configuration of transformers, as an object.

    Attributes:
        rotary_class: name of the class in `modeling_*.py` that computes cosines and sines of RoPE.
        qkv_bias, o_bias, mlp_bias: whether the linear layers have biases.
        norms: of a decoder layer, their places in `kernels.decoder.Layer` and their names.
        norm_kind: RMSNorm or LayerNorm.
        norm_epsilon: a number, or the name of the setting that holds it.
        norm_parameters: tensors of a norm.
        norm_all_heads: a norm of queries or keys is one over all heads together, not one over each head.
        has_rope: whether a decoder layer applies RoPE to its queries and keys.
        window: tokens that a decoder layer sees; None for all.
        unsupported: what the decoder cannot compute of a configuration, as the end of "there is no native code for";
            an empty string where there is nothing.
    """

    rotary_class: str
    qkv_bias: Callable[[Any], bool] = never
    o_bias: Callable[[Any], bool] = never
    mlp_bias: Callable[[Any], bool] = never
    norms: Mapping[str, str] = field(default_factory=lambda: NORMS_BEFORE)
    norm_kind: Literal["rms", "layer"] = "rms"
    norm_epsilon: str | float = "rms_norm_eps"
    norm_parameters: tuple[str, ...] = ("weight",)
    norm_all_heads: bool = False
    has_rope: Callable[[Any, int], bool] = every_layer
    window: Callable[[Any, int], int | None] = no_window
    unsupported: Callable[[Any], str] = all_supported


@dataclass(frozen=True)
class GgufArchitecture:
    """What GGUF files have to know. Functions get the complete configuration as JSON values.

    Attributes:
        name: llama.cpp's name of the architecture (`general.architecture`).
        interleaved_rope: llama.cpp rotates neighbouring rows of q and k together, where transformers rotates row i of a
            head with row i + half; the rows are sorted on the way.
        biases: llama.cpp's names of the parts whose bias it reads.
        qk_norms: whether it reads norms of q and k.
        rope_types: ways to scale rotary positions that it knows.
        all_layers_slide: every layer of the model sees a sliding window where the configuration has one.
        unsupported: what llama.cpp cannot compute of a configuration, as the end of "cannot be exported as GGUF:"; an
            empty string where there is nothing.
    """

    name: str
    interleaved_rope: bool
    biases: frozenset[str]
    qk_norms: bool = False
    rope_types: frozenset[str] = GGUF_ROPE_TYPES
    all_layers_slide: bool = False
    unsupported: Callable[[dict[str, Any]], str] = all_supported


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        native: for the native decoder; None where only transformers runs the model.
        gguf: for GGUF files; None where they cannot hold the model.
    """

    native: NativeArchitecture | None = None
    gguf: GgufArchitecture | None = None


def head_size(config: dict[str, Any]) -> int:
    """Width of an attention head, from a configuration as JSON values."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
