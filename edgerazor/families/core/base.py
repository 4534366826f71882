"""What has to be known of an architecture, and the names of a decoder's tensors.

Most open language models are the same decoder with small differences: which linear layers have biases, which norms
there are and where they stand, whether a layer sees a sliding window or applies RoPE. A `Family` lists the differences
twice, once for each program that computes the model from code of its own:

- `NativeArchitecture` for our C++ decoder (`runtime/network.py`), after `modeling_*.py` of transformers;
- `GgufArchitecture` for llama.cpp (`exporters/gguf.py`, `importers/gguf.py`, `models/gguf_configuration.py`), after
  `src/models/*.cpp` and `conversion/*.py` of llama.cpp.

Either is None where that program does not compute the architecture. Sizes are never in a family: they come from the
configuration. Tensors are named as in a checkpoint of transformers.

This room knows names and facts of configurations only; it imports neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens", "lm_head", "model.norm"
#: Linear layers of attention and of an MLP with a gate, by their places, in the order in which a token meets them.
#: `qkv` and `gate_up` are the places of one matrix for all three, or both; `attention_gate` is that of a gate.
ATTENTION = {name: f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")}
MLP = {name: f"mlp.{name}_proj" for name in ("gate", "up", "down")}
LINEARS = {**ATTENTION, **MLP}
#: Linear layers of other mixers. The names of their parameters that are no matrices are in `runtime/network.py`.
SHORT_CONVOLUTION = {"inputs": "conv.in_proj", "o": "conv.out_proj"}
GATED_DELTA_RULE = {
    **{"qkv": "linear_attn.in_proj_qkv", "z": "linear_attn.in_proj_z"},
    **{"beta": "linear_attn.in_proj_b", "alpha": "linear_attn.in_proj_a", "o": "linear_attn.out_proj"},
}
MAMBA2 = {"inputs": "mamba.in_proj", "o": "mamba.out_proj"}
#: Attention, MLP and norms of LFM 2, which share places with those of LFM 3 in part.
LFM2_LINEARS = {
    **{name: f"self_attn.{name}_proj" for name in ("q", "k", "v")},
    **{"o": "self_attn.out_proj", "gate": "feed_forward.w1"},
    **{"up": "feed_forward.w3", "down": "feed_forward.w2"},
}
LFM2_NORMS = {
    **{"before_attention": "operator_norm", "before_mlp": "ffn_norm"},
    **{"q_norm": "self_attn.q_layernorm", "k_norm": "self_attn.k_layernorm"},
}
#: Their names in GGUF files.
LFM2_GGUF = {
    **{"operator_norm": "attn_norm", "ffn_norm": "ffn_norm", "model.embedding_norm": "token_embd_norm"},
    **{"self_attn.q_layernorm": "attn_q_norm", "self_attn.k_layernorm": "attn_k_norm"},
    **{"self_attn.out_proj": "attn_output", "feed_forward.w1": "ffn_gate"},
    **{"feed_forward.w3": "ffn_up", "feed_forward.w2": "ffn_down", "conv.conv": "shortconv.conv"},
    **{"conv.in_proj": "shortconv.in_proj", "conv.out_proj": "shortconv.out_proj"},
}
#: Places of linear layers of keys and values.
KEY_PLACES = frozenset({"k", "v"})
#: All places of linear layers of an MLP.
MLP_PLACES = frozenset({"gate", "up", "gate_up", "down"})
#: What mixes the tokens of a decoder layer.
Mixer = Literal["attention", "short_convolution", "gated_delta_rule", "mamba2"]
#: Norms of a decoder layer: place in the native decoder's `Layer` -> name in a checkpoint. Norms before attention and
#: MLP (Llama), norms behind both (OLMo 2), norms before and behind (Gemma 2), and norms of queries and keys.
NORMS_BEFORE = {"before_attention": "input_layernorm", "before_mlp": "post_attention_layernorm"}
NORMS_AFTER = {"after_attention": "post_attention_layernorm", "after_mlp": "post_feedforward_layernorm"}
NORMS_AROUND = {
    **{"before_attention": "input_layernorm", "after_attention": "post_attention_layernorm"},
    **{"before_mlp": "pre_feedforward_layernorm", "after_mlp": "post_feedforward_layernorm"},
}
QK_NORMS = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}

#: llama.cpp's names of norms before and behind, and behind alone.
GGUF_NORMS_AROUND = {
    **{"post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm"},
    "post_feedforward_layernorm": "post_ffw_norm",
}
#: llama.cpp's names of the parts of a decoder layer whose biases it reads, as one of these sets.
GGUF_QKV_BIASES = frozenset({"attn_q", "attn_k", "attn_v"})
GGUF_ALL_BIASES = GGUF_QKV_BIASES | {"attn_output", "ffn_gate", "ffn_up", "ffn_down"}
#: Numbers in words.
ORDINALS = {2: "second", 4: "fourth", 6: "sixth"}
#: Granite's factors: key of a GGUF file -> setting.
GRANITE_FACTORS = {
    **{"attention.scale": "attention_multiplier", "embedding_scale": "embedding_multiplier"},
    **{"residual_scale": "residual_multiplier", "logit_scale": "logits_scaling"},
}
#: A number, or one for each layer, in the metadata of a GGUF file.
GgufValue = bool | int | float | str | list[int] | list[bool]
#: Tensors that divide the frequencies of rotary positions in Phi 3: beyond the original context, and within it.
GGUF_LONG_FACTORS, GGUF_SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
#: Ways to scale rotary positions (`rope_type`) that every architecture of llama.cpp knows.
GGUF_ROPE_TYPES = frozenset({"default", "linear", "yarn"})


class GgufMetadata(Protocol):
    """Metadata of a GGUF file, read by `models/gguf_configuration.py`; keys come without the architecture's name."""

    architecture: str

    def has(self, key: str) -> bool:
        """Whether there is such a key."""

    def has_tensor(self, name: str) -> bool:
        """Whether there is such a tensor."""

    def value(self, key: str, default: Any = None) -> Any:
        """The value of a key."""

    def number(self, key: str, default: int | None = None, least: int = 1) -> int:
        """A whole number."""

    def decimal(self, key: str, default: float | None = None) -> float:
        """A positive float32 number as it was written in decimals."""

    def vocabulary(self) -> int:
        """Rows of the embedding."""

    def head_size(self) -> int:
        """Width of an attention head."""

    def rope_parameters(self, usual_base: float = 10000.0) -> dict[str, Any]:
        """The parameters of rotary positions, as configurations have them."""

    def rope_factors(self, name: str) -> list[float]:
        """What divides the frequencies of rotary positions, from a tensor."""

    def layer_types(self, usual: int) -> list[str]:
        """Which layers see a window: all but each n-th, or as a list says."""

    def damaged(self, reason: str) -> Exception:
        """The error for a file that contradicts itself; `reason` follows a colon."""


def rms_epsilon(get: GgufMetadata) -> dict[str, Any]:
    """The setting of RMSNorm."""
    return {"rms_norm_eps": get.decimal("attention.layer_norm_rms_epsilon", 1e-6)}


def configure_llama(get: GgufMetadata) -> dict[str, Any]:
    """Settings of Llama and its kin: RMSNorm, biases where there are some, rotary positions."""
    parts = {"attention_bias": "attn_output", "mlp_bias": "ffn_up"}
    biases = {field: get.has_tensor(f"blk.0.{part}.bias") for field, part in parts.items()}
    return {**rms_epsilon(get), **biases, "rope_parameters": get.rope_parameters()}


def configure_qwen(get: GgufMetadata) -> dict[str, Any]:
    """Settings of Qwen 2 and 3, whose GGUF files have no windows."""
    return {**rms_epsilon(get), "use_sliding_window": False, "rope_parameters": get.rope_parameters()}


def configure_gemma(get: GgufMetadata) -> dict[str, Any]:
    """Settings of Gemma 1, and those that Gemma 2 has of it."""
    activation = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
    return {**rms_epsilon(get), **activation, "rope_parameters": get.rope_parameters()}


def gemma_query_scalar(get: GgufMetadata, by_width: bool) -> int:
    """What Gemma divides scores by the root of: the width of a head, or the model's over its heads."""
    if by_width:
        return get.number("embedding_length") // get.number("attention.head_count")
    return get.head_size()


def configure_experts(get: GgufMetadata) -> dict[str, Any]:
    """How many experts a mixture has, and how many of them are chosen for a token."""
    return {"num_experts": get.number("expert_count"), "num_experts_per_tok": get.number("expert_used_count")}


def never(config: Any) -> bool:
    """No linear layer of that kind has a bias."""
    return False


def never_in(config: Any, layer: int) -> bool:
    """In no decoder layer."""
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


def window_of_all(config: Any, layer: int) -> int | None:
    """Every decoder layer sees a window of `sliding_window` tokens, where the configuration has one."""
    window: int | None = config.sliding_window
    return window


def rope_by_layer_type(config: Any, layer: int) -> str:
    """Positions of their own for each of the `layer_types` (Gemma 3)."""
    layer_type: str = config.layer_types[layer]
    return layer_type


def attention(config: Any, layer: int) -> Mixer:
    """Every decoder layer has attention."""
    return "attention"


def hidden_act(config: Any) -> str:
    """The activation function of the MLP, as transformers calls it."""
    return str(config.hidden_act)


def hidden_activation(config: Any) -> str:
    """As `hidden_act`, under Gemma's name of the setting."""
    return str(config.hidden_activation)


def intermediate_size(config: Any, layer: int) -> int:
    """Features between the matrices of an MLP."""
    size: int = config.intermediate_size
    return size


def one(config: Any) -> float:
    """No factor."""
    return 1.0


def no_cap(config: Any) -> float:
    """Nothing is capped."""
    return 0.0


def root_of_width(config: Any) -> float:
    """Gemma's factor of embeddings."""
    return float(config.hidden_size**0.5)


def by_head_size(config: Any) -> float:
    """The usual factor of attention scores."""
    return float(head_width(config) ** -0.5)


def by_query_scalar(config: Any) -> float:
    """Gemma's factor of attention scores."""
    return float(config.query_pre_attn_scalar**-0.5)


def attention_multiplier(config: Any) -> float:
    """Granite's factor of attention scores."""
    return float(config.attention_multiplier)


def embedding_multiplier(config: Any) -> float:
    """Granite's factor of embeddings."""
    return float(config.embedding_multiplier)


def residual_multiplier(config: Any) -> float:
    """Granite's factor of what is added to the residual stream."""
    return float(config.residual_multiplier)


def over_logits_scaling(config: Any) -> float:
    """Granite's factor of logits."""
    return float(1.0 / config.logits_scaling)


def head_width(config: Any) -> int:
    """Width of an attention head, from a configuration of transformers."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


class KvHeads(NamedTuple):
    """Heads of keys and values of a layer; its queries have the same width."""

    heads: int
    width: int


def same_kv_heads(config: Any, layer: int) -> KvHeads:
    """All decoder layers have heads of one width."""
    return KvHeads(int(config.num_key_value_heads), head_width(config))


def own_keys(config: Any, layer: int) -> int | None:
    """Every decoder layer attends to keys and values of its own."""
    return None


def experts_per_token(config: Any) -> int | None:
    """How many of a layer's experts compute a token, by a configuration; None where it does not say."""
    chosen = getattr(config, "num_experts_per_tok", None) or getattr(config, "top_k_experts", None)
    return chosen if isinstance(chosen, int) else None


def all_supported(config: Any) -> str:
    """No setting of the configuration is beyond what the program computes."""
    return ""


def nothing_more(config: dict[str, Any]) -> dict[str, GgufValue]:
    """GGUF files say nothing beyond what all files say."""
    return {}


def nothing_instead(config: dict[str, Any]) -> None:
    """Files call all configurations of the family alike."""


def no_factors(config: dict[str, Any]) -> dict[str, list[float]]:
    """No tensor divides the frequencies of rotary positions."""
    return {}


def no_orders(config: dict[str, Any]) -> dict[str, list[int]]:
    """Rows and columns stay in their places."""
    return {}


def rope_as_configured(config: dict[str, Any]) -> dict[str, Any]:
    """The parameters of rotary positions; those of layers without a window, where layers with one have their own."""
    parameters: dict[str, Any] = config.get("rope_parameters") or {}
    return dict(parameters.get("full_attention", parameters))


def final_soft_cap(config: Any) -> float:
    """Gemma's cap of logits; 0 where there is none."""
    return float(config.final_logit_softcapping or 0.0)


def looks_ahead(config: Any) -> str:
    """What is not computed of a Gemma that is trained to see later tokens."""
    return "attention to later tokens" if config.use_bidirectional_attention else ""


def looks_ahead_in_gguf(config: dict[str, Any]) -> str:
    """The same of what llama.cpp does not compute."""
    return "it attends to later tokens" if config.get("use_bidirectional_attention") else ""


def convolution_or_attention(config: Any, layer: int) -> Mixer:
    """The mixer of a layer of LFM 2 or 3."""
    return "short_convolution" if config.layer_types[layer] == "conv" else "attention"


def lfm2_metadata(config: dict[str, Any]) -> dict[str, GgufValue]:
    """What GGUF files say of LFM 2: layers of convolutions have no heads of keys."""
    heads = config["num_key_value_heads"]
    return {
        "attention.head_count_kv": [0 if kind == "conv" else heads for kind in config["layer_types"]],
        "attention.layer_norm_rms_epsilon": float(config["norm_eps"]),
        "shortconv.l_cache": config["conv_L_cache"],
    }


def heads_are_narrow(config: dict[str, Any]) -> str:
    """What is beyond code of llama.cpp that takes the width of all heads together to be that of the model."""
    fits = head_size(config) * config["num_attention_heads"] == config["hidden_size"]
    return "" if fits else "its heads together are not as wide as the model"


def every_nth_is_full(config: dict[str, Any], n: int) -> str:
    """What is beyond code of llama.cpp that gives each n-th layer no window."""
    layers, kinds = config["num_hidden_layers"], config["layer_types"]
    usual = ["full_attention" if (layer + 1) % n == 0 else "sliding_attention" for layer in range(layers)]
    return "" if kinds == usual else f"its layers without a window are not every {ORDINALS[n]} one"


def scale_keys(keys: Mapping[str, str]) -> Callable[[dict[str, Any]], dict[str, GgufValue]]:
    """Numbers of a configuration under names of GGUF: key of a file -> setting."""
    return lambda config: {key: float(config[setting]) for key, setting in keys.items()}


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in the place of a layer's MLP, or beside it. Every expert is `down(act(gate(x)) * up(x))`.

    Attributes:
        path: of the list of experts in a layer; an expert's matrices are `path.NUMBER.gate_proj` and so on.
        router: its path in the layer.
        count: how many experts there are.
        chosen: how many of them compute a token, those with the largest scores.
        intermediate_size: features between the matrices of an expert.
        scores: of experts, by what the router gives: a softmax over all of them, or sigmoids.
        normalized: weights are the scores of the chosen experts over (their sum + `epsilon`), not the scores. (A
            softmax over the chosen experts alone is the normalized softmax over all.)
        epsilon: as above.
        scale: a factor of the weights.
        choice_bias: the tensor in a layer that is added to scores to choose experts by, and to nothing else; empty:
            there is none.
        factors: the tensor in a layer that holds a factor of the weights of each expert; empty: there is none.
        beside_mlp: the layer has an MLP, too, an expert that all tokens share; what both give is added up.
        norms: of the layer, `before` the experts, `after` them, and of the MLP alone, `after_mlp_alone`: place -> name
        router_gains: the tensor in a layer that, times `router_scale`, holds the gains of an RMSNorm of the residual
            stream for the router; empty: it gets what experts get.
    """

    path: str
    router: str
    count: int
    chosen: int
    intermediate_size: int
    scores: Literal["softmax", "sigmoid"] = "softmax"
    normalized: bool = False
    epsilon: float = 0.0
    scale: float = 1.0
    choice_bias: str = ""
    factors: str = ""
    beside_mlp: bool = False
    norms: Mapping[str, str] = field(default_factory=dict)
    router_gains: str = ""
    router_scale: float = 1.0

    def linears(self) -> list[dict[str, str]]:
        """The linear layers of each expert: place -> name."""
        return [
            {place: f"{self.path}.{number}.{place}_proj" for place in ("gate", "up", "down")}
            for number in range(self.count)
        ]


def no_experts(config: Any, layer: int) -> Experts | None:
    """Every decoder layer has an MLP."""
    return None


@dataclass(frozen=True)
class LayerInputs:
    """Inputs of single decoder layers: for all of them together, and `features` of these for each,
    `scale * (norm(projection_scale * projection(embedding)) + table_scale * row of the table)`. A layer adds
    `o(act(gate(x)) * input)` to the residual stream, behind the MLP.

    Attributes:
        features: of the input of a layer.
        table: path of the embedding whose rows are those of tokens.
        projection: path of the linear layer of a token's embedding; it is not quantized.
        norm: path of the norm, of each layer's features.
        table_scale, projection_scale, scale: as above.
        gate, o: the linear layers in a decoder layer.
    """

    features: int
    table: str
    projection: str
    norm: str
    table_scale: float
    projection_scale: float
    scale: float
    gate: str
    o: str

    def linears(self) -> dict[str, str]:
        """The linear layers of a decoder layer: place -> name."""
        return {"input_gate": self.gate, "input_o": self.o}


def no_layer_inputs(config: Any) -> LayerInputs | None:
    """Nothing goes into a decoder layer but what the one before it gives."""
    return None


@dataclass(frozen=True)
class NativeArchitecture:
    """The parts that the native decoder composes a model of. Functions get the configuration of transformers, as an
    object; those of a layer get its number, too.

    Attributes:
        rotary_class: name of the class in `modeling_*.py` that computes cosines and sines of RoPE.
        qkv_bias, o_bias, mlp_bias: whether the linear layers have biases.
        linears: of attention and of the MLP, their places (`LINEARS`) and their names.
        mixer: what mixes the tokens of a layer.
        mixers: the linear layers of mixers other than attention, likewise, for those that the architecture has.
        activation: the function in the MLP, as transformers calls it.
        intermediate_size: features between the matrices of the MLP.
        experts: what a layer has in the place of the MLP, or beside it; None where it has an MLP alone.
        layer_inputs: what single layers get beside the residual stream; None where they get nothing.
        kv_heads: heads of keys and values of a layer.
        kv_source: the earlier layer whose keys and values a layer attends to, having none; None where it has its own.
        values_are_keys: a layer has no matrix of values: they are what that of keys gives.
        value_norm: each head of values has an RMSNorm without gains.
        output_scale: the tensor in a layer that is a factor of the residual stream behind it; empty: there is none.
        gated_queries: the rows of q are, head by head, those of the query and those of a gate of attention's result.
        norms: of a decoder layer, their places in `kernels.decoder.Layer` and their names.
        final_norm: name of the norm before the head.
        norm_kind: RMSNorm or LayerNorm.
        norm_epsilon: a number, or the name of the setting that holds it.
        norm_parameters: tensors of a norm.
        norm_offset: what is added to the gains of norms.
        norm_after_rope: norms of queries and keys come after RoPE instead of before.
        norm_all_heads: a norm of queries or keys is one over all heads together, not one over each head.
        has_rope: whether a decoder layer applies RoPE to its queries and keys.
        rope_table: which positions a layer has, where layers differ: the key of its `rope_parameters`.
        query_scaling: beta and length of a factor of queries, 1 + beta * log(1 + floor(position / length)); None: none.
        window: tokens that a decoder layer sees; None for all.
        attention_scale, embedding_scale, residual_scale, logit_scale: factors of attention scores, of embeddings, of
            what is added to the residual stream, and of logits.
        attention_soft_cap, logit_soft_cap: x becomes cap * tanh(x / cap), where the cap is not 0.
        unsupported: what the decoder cannot compute of a configuration, as the end of "there is no native code for";
            an empty string where there is nothing.
    """

    rotary_class: str
    qkv_bias: Callable[[Any], bool] = never
    o_bias: Callable[[Any], bool] = never
    mlp_bias: Callable[[Any], bool] = never
    linears: Mapping[str, str] = field(default_factory=lambda: LINEARS)
    mixer: Callable[[Any, int], Mixer] = attention
    mixers: Mapping[Mixer, Mapping[str, str]] = field(default_factory=dict)
    activation: Callable[[Any], str] = hidden_act
    intermediate_size: Callable[[Any, int], int] = intermediate_size
    experts: Callable[[Any, int], Experts | None] = no_experts
    layer_inputs: Callable[[Any], LayerInputs | None] = no_layer_inputs
    kv_heads: Callable[[Any, int], KvHeads] = same_kv_heads
    kv_source: Callable[[Any, int], int | None] = own_keys
    values_are_keys: Callable[[Any, int], bool] = never_in
    value_norm: bool = False
    output_scale: str = ""
    gated_queries: bool = False
    norms: Mapping[str, str] = field(default_factory=lambda: NORMS_BEFORE)
    final_norm: str = FINAL_NORM
    norm_kind: Literal["rms", "layer"] = "rms"
    norm_epsilon: str | float = "rms_norm_eps"
    norm_parameters: tuple[str, ...] = ("weight",)
    norm_offset: float = 0.0
    norm_after_rope: bool = False
    norm_all_heads: bool = False
    has_rope: Callable[[Any, int], bool] = every_layer
    rope_table: Callable[[Any, int], str] | None = None
    query_scaling: Callable[[Any], tuple[float, int]] | None = None
    window: Callable[[Any, int], int | None] = no_window
    attention_scale: Callable[[Any], float] = by_head_size
    embedding_scale: Callable[[Any], float] = one
    residual_scale: Callable[[Any], float] = one
    logit_scale: Callable[[Any], float] = one
    attention_soft_cap: Callable[[Any], float] = no_cap
    logit_soft_cap: Callable[[Any], float] = no_cap
    unsupported: Callable[[Any], str] = all_supported

    def linears_of(self, config: Any, layer: int) -> dict[str, str]:
        """The linear layers of a decoder layer: place -> name; those of experts are not among them."""
        mixer = self.mixer(config, layer)
        mlp = {place: name for place, name in self.linears.items() if place in MLP_PLACES}
        of_attention = {place: name for place, name in self.linears.items() if place not in mlp}
        if self.kv_source(config, layer) is not None:
            of_attention = {place: name for place, name in of_attention.items() if place not in KEY_PLACES}
        elif self.values_are_keys(config, layer):
            del of_attention["v"]
        of_mixer = of_attention if mixer == "attention" else dict(self.mixers[mixer])
        inputs, experts = self.layer_inputs(config), self.experts(config, layer)
        return {
            **of_mixer,
            **(mlp if experts is None or experts.beside_mlp else {}),
            **(inputs.linears() if inputs else {}),
        }

    def names_of(self, config: Any, layer: int) -> list[str]:
        """The names of all linear layers of a decoder layer, in the order in which a token meets them."""
        experts = self.experts(config, layer)
        of_experts = [name for linears in experts.linears() for name in linears.values()] if experts else []
        return [*self.linears_of(config, layer).values(), *of_experts]


@dataclass(frozen=True)
class GgufArchitecture:
    """What GGUF files have to know. `unsupported` gets the complete configuration as JSON values.

    Attributes:
        name: llama.cpp's name of the architecture (`general.architecture`).
        interleaved_rope: llama.cpp rotates neighbouring rows of q and k together, where transformers rotates row i of a
            head with row i + half; the rows are sorted on the way.
        configure: fields of a configuration beyond those of all families, from a file's metadata; None where files of
            this name are read as another model type, or not at all.
        norm_offset: what conversion added to the gains of norms.
        whole_norms: norms of a decoder layer whose gains were whole before.
        parameters: llama.cpp's whole names of parameters of a decoder layer that are neither weight nor bias.
        decays: those parameters x that files have as -exp(x).
        upright: those parameters [n] that files have as matrices [n, 1].
        halves: linear layers of a decoder layer whose upper and lower rows are two tensors of files, by llama.cpp's
            names of these (gate and up in one matrix).
        row_orders, column_orders: llama.cpp's name of a part of a decoder layer -> which row, or column, of the model
            stands at each place of the file, beside the rows of q and k.
        partial_rope: a part of each head may be rotated, so that the rotated width is not that of a head.
        float16: the model's states stay in the range of float16.
        exported: whether we write files of it; what follows is for that alone.
        instead: what files call some configurations of the family; None for those that are as said here.
        head: whether there is a tensor of the head: never (the embedding is the head), always, or where it is its own.
        parts: llama.cpp's names of parts of a decoder layer, and of the final norm, where
            `exporters/core/gguf_names.py` has others.
        metadata: what a file says of a configuration beyond, or instead of, what all files say; keys come without the
            architecture's name.
        activation: the function in the MLP, as transformers calls it.
        biases: llama.cpp's names of the parts whose bias it reads.
        qk_norms: whether it reads norms of q and k.
        rope: the parameters of rotary positions as llama.cpp knows them.
        rope_types: ways to scale rotary positions that it knows.
        rope_factors: tensors that divide the frequencies of rotary positions, beside those of `llama3`.
        experts: it is a mixture of experts: llama.cpp stacks the matrices of a layer's experts.
        all_layers_slide: every layer of the model sees a sliding window where the configuration has one.
        windows: llama.cpp computes the windows of its layers.
        unsupported: what llama.cpp cannot compute of a configuration, as the end of "cannot be exported as GGUF:"; an
            empty string where there is nothing.
        note: what llama.cpp does otherwise all the same, as a sentence; an empty string where there is nothing.
    """

    name: str
    interleaved_rope: bool
    configure: Callable[[GgufMetadata], dict[str, Any]] | None = None
    norm_offset: float = 0.0
    whole_norms: frozenset[str] = frozenset()
    parameters: Mapping[str, str] = field(default_factory=dict)
    decays: frozenset[str] = frozenset()
    upright: frozenset[str] = frozenset()
    halves: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    row_orders: Callable[[dict[str, Any]], dict[str, list[int]]] = no_orders
    column_orders: Callable[[dict[str, Any]], dict[str, list[int]]] = no_orders
    partial_rope: bool = False
    float16: bool = True
    exported: bool = True
    instead: Callable[[dict[str, Any]], GgufArchitecture | None] = nothing_instead
    head: Literal["never", "always", "own"] = "own"
    parts: Mapping[str, str] = field(default_factory=dict)
    metadata: Callable[[dict[str, Any]], dict[str, GgufValue]] = nothing_more
    activation: str = "silu"
    biases: frozenset[str] = frozenset()
    qk_norms: bool = False
    rope: Callable[[dict[str, Any]], dict[str, Any]] = rope_as_configured
    rope_types: frozenset[str] = GGUF_ROPE_TYPES
    rope_factors: Callable[[dict[str, Any]], dict[str, list[float]]] = no_factors
    all_layers_slide: bool = False
    experts: bool = False
    windows: bool = False
    unsupported: Callable[[dict[str, Any]], str] = all_supported
    note: Callable[[dict[str, Any]], str] = all_supported


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        native: for the native decoder; None where only transformers runs the model.
        gguf: for GGUF files; None where we neither read nor write them.
    """

    native: NativeArchitecture | None = None
    gguf: GgufArchitecture | None = None


def head_size(config: dict[str, Any]) -> int:
    """Width of an attention head, from a configuration as JSON values."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
