"""Architectures that the native engine knows, as transformers has them.

A family is what its `modeling_*.py` computes beyond the common decoder: which linear layers have biases, which norms
there are and where, which layers see a window or no positions. Sizes come from the configuration. Everything is named
as in a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from edgerazor import kernels
from edgerazor.errors import UserError, plain
from edgerazor.formats import INPUT_SCALE
from edgerazor.kernels import decoder, native
from edgerazor.kernels.decoder import Layer, Linear, Network, Norm
from edgerazor.packed import PackedModel, has_zero_points

EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens", "lm_head", "model.norm"
#: Linear layers of a decoder layer, in the order in which a token meets them.
LINEARS = {
    **{name: f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")},
    **{name: f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}
_BEFORE = {"before_attention": "input_layernorm", "before_mlp": "post_attention_layernorm"}
_AFTER = {"after_attention": "post_attention_layernorm", "after_mlp": "post_feedforward_layernorm"}
_OF_HEADS = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
_NORM_KEYS = (*_BEFORE, *_AFTER, *_OF_HEADS)


class NotNativeError(Exception):
    """The native engine cannot compute a model; the message ends a sentence that says so."""

    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.reason, self.hint = reason, hint


def _never(config: Any) -> bool:
    return False


def _all_layers(config: Any, layer: int) -> bool:
    return True


def _no_window(config: Any, layer: int) -> int | None:
    return None


def _window_of_type(config: Any, layer: int) -> int | None:
    return config.sliding_window if config.layer_types[layer] == "sliding_attention" else None


@dataclass(frozen=True)
class Family:
    """What is special about an architecture.

    Attributes:
        rotary: the class of its rotary embedding, in the file of its model.
        qkv_bias, o_bias, mlp_bias: whether its linear layers have biases, by configuration.
        norms: of a layer, their places in `Layer` and their names.
        kind: of the norms.
        epsilon: of the norms: a number, or the setting that says it.
        affine: parameters of a norm.
        norm_all_heads: norms of queries and keys are of all heads together.
        has_positions: whether a layer turns queries and keys.
        window: of a layer; None: it sees everything.
        unknown: what no native code knows of settings that a configuration may have; an empty string for nothing.
    """

    rotary: str
    qkv_bias: Callable[[Any], bool] = _never
    o_bias: Callable[[Any], bool] = _never
    mlp_bias: Callable[[Any], bool] = _never
    norms: Mapping[str, str] = field(default_factory=lambda: _BEFORE)
    kind: int = decoder.RMS
    epsilon: str | float = "rms_norm_eps"
    affine: tuple[str, ...] = ("weight",)
    norm_all_heads: bool = False
    has_positions: Callable[[Any, int], bool] = _all_layers
    window: Callable[[Any, int], int | None] = _no_window
    unknown: Callable[[Any], str] = lambda _: ""


def _attention_bias(config: Any) -> bool:
    return bool(config.attention_bias)


def _stablelm_unknown(config: Any) -> str:
    if config.use_parallel_residual:
        return "attention and MLP side by side"
    return "norms of its own for each head" if config.qk_layernorm else ""


#: Model type -> family, after modeling_*.py of transformers 5.
FAMILIES = {
    "llama": Family("LlamaRotaryEmbedding", _attention_bias, _attention_bias, lambda config: bool(config.mlp_bias)),
    "qwen2": Family("Qwen2RotaryEmbedding", lambda _: True, window=_window_of_type),
    "qwen3": Family(
        "Qwen3RotaryEmbedding", _attention_bias, _attention_bias, norms={**_BEFORE, **_OF_HEADS}, window=_window_of_type
    ),
    "mistral": Family("MistralRotaryEmbedding", window=lambda config, _: config.sliding_window),
    "smollm3": Family(
        "SmolLM3RotaryEmbedding",
        _attention_bias,
        _attention_bias,
        lambda config: bool(config.mlp_bias),
        has_positions=lambda config, layer: bool(config.no_rope_layers[layer]),
        window=_window_of_type,
    ),
    "olmo2": Family(
        "Olmo2RotaryEmbedding",
        _attention_bias,
        _attention_bias,
        norms={**_AFTER, **_OF_HEADS},
        norm_all_heads=True,
    ),
    "olmo": Family(
        "OlmoRotaryEmbedding",
        _attention_bias,
        _attention_bias,
        kind=decoder.LAYER,
        epsilon=1e-5,
        affine=(),
        unknown=lambda config: "" if config.clip_qkv is None else "queries, keys and values that are cut off",
    ),
    "stablelm": Family(
        "StableLmRotaryEmbedding",
        lambda config: bool(config.use_qkv_bias),
        kind=decoder.LAYER,
        epsilon="layer_norm_eps",
        affine=("weight", "bias"),
        unknown=_stablelm_unknown,
    ),
}


def family_of(config: Any, packed: PackedModel) -> Family:
    """The family of a packed model that the native engine computes on this machine.

    Raises:
        NotNativeError: it does not.
        UserError: `EDGERAZOR_ISA` asks for kernels that there are not.
    """
    _check_kernels()
    if config.model_type not in FAMILIES:
        raise NotNativeError(f"there is no native code for models of type {config.model_type}")
    family = FAMILIES[config.model_type]
    if config.hidden_act != "silu":
        raise NotNativeError(f"there is no native code for the activation function {plain(config.hidden_act, 50)}")
    if unknown := family.unknown(config):
        raise NotNativeError(f"there is no native code for {unknown}")
    _check_settings(packed)
    names = {*matrix_names(config, packed)}
    for name in sorted(names - packed.header.matrices.keys()):
        if f"{name}.weight" in packed.header.others:
            raise NotNativeError(f"its matrix {name} is not quantized")
        raise UserError(f"{packed.folder} lacks the tensor {name}.weight.", "Pack the model again.")
    for name in sorted(packed.header.matrices.keys() - names):
        raise _misfit(packed, name)
    return family


def _check_kernels() -> None:
    if native.library() is None:
        raise NotNativeError(native.missing(), kernels.BUILD)
    if not kernels.is_native():
        raise NotNativeError(f"{kernels.VARIABLE} asks for the kernels {kernels.name()}")


def _check_settings(packed: PackedModel) -> None:
    settings = packed.header.settings
    for name, what in (("query_bits", "queries"), ("probability_bits", "attention probabilities")):
        if settings[name] != 16:
            raise NotNativeError(f"there is no native code for {what} in {settings[name]} bits")
    if settings["adaptive_tokens"] != "off":
        raise NotNativeError("there is no native code for tokens with bits of their own")
    if has_zero_points(packed.header.others):
        raise NotNativeError("there is no native code for activations with zero points")
    for name, entry in packed.header.matrices.items():
        if packed.spec(name).block_formats is not None:
            raise NotNativeError(f"there is no native code for formats of blocks, as in {name}")
        assert entry.formats


def matrix_names(config: Any, packed: PackedModel) -> list[str]:
    """The matrices of a model, in the order in which a token meets them, the embedding of which it reads a row last."""
    layers = range(config.num_hidden_layers)
    names = [f"model.layers.{layer}.{name}" for layer in layers for name in LINEARS.values()]
    head = packed.header.tied.get(HEAD, HEAD)
    return [*names, head, *([] if head == EMBEDDING else [EMBEDDING])]


def network(
    config: Any, family: Family, packed: PackedModel, matrices: Mapping[str, native.Matrix], rotary_features: int
) -> Network:
    """The whole decoder.

    Args:
        config: of transformers.
        family: of the model.
        packed: where norms, biases and settings are.
        matrices: of all names of `matrix_names`.
        rotary_features: of a head that the rotary embedding turns.

    Raises:
        UserError: a tensor is missing or damaged, or has another shape than the configuration says.
    """
    pieces = _Pieces(config, family, packed, matrices)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    settings = packed.header.settings
    embedding = pieces.linear(EMBEDDING, (config.vocab_size, config.hidden_size), False)
    head = pieces.linear(HEAD, (config.vocab_size, config.hidden_size), False)
    return Network(
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        head_dim,
        config.intermediate_size,
        embedding,
        head,
        pieces.norm(FINAL_NORM, config.hidden_size),
        [pieces.layer(number, head_dim, rotary_features) for number in range(config.num_hidden_layers)],
        rotary_features,
        activation_bits=settings["activation_bits"],  # type: ignore[arg-type]
        kv_bits=settings["kv_bits"],  # type: ignore[arg-type]
        norm_all_heads=family.norm_all_heads,
        attention_scale=head_dim**-0.5,
    )


class _Pieces:
    """Makes the parts of a network."""

    def __init__(self, config: Any, family: Family, packed: PackedModel, matrices: Mapping[str, native.Matrix]) -> None:
        self.config, self.family, self.packed, self.matrices = config, family, packed, matrices
        self.others = packed.others()
        self.input_scales = packed.input_scales()

    def layer(self, number: int, head_dim: int, rotary: int) -> Layer:
        config, family = self.config, self.family
        place = f"model.layers.{number}"
        query, key = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
        hidden, inner = config.hidden_size, config.intermediate_size
        qkv, mlp = family.qkv_bias(config), family.mlp_bias(config)
        shapes = {"q": (query, hidden), "k": (key, hidden), "v": (key, hidden), "o": (hidden, query)}
        shapes |= {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
        biases = {**dict.fromkeys("qkv", qkv), "o": family.o_bias(config), **dict.fromkeys(("gate", "up", "down"), mlp)}
        linears: dict[str, Any] = {
            each: self.linear(f"{place}.{name}", shapes[each], biases[each]) for each, name in LINEARS.items()
        }
        widths = dict.fromkeys(_NORM_KEYS, hidden)
        widths |= {"q_norm": query, "k_norm": key} if family.norm_all_heads else dict.fromkeys(_OF_HEADS, head_dim)
        norms: dict[str, Any] = {
            each: self.norm(f"{place}.{name}", widths[each]) for each, name in family.norms.items()
        }
        window = family.window(config, number)
        turned = rotary if family.has_positions(config, number) else 0
        return Layer(**linears, **norms, rope_dim=turned, sliding_window=window or 0)

    def linear(self, name: str, shape: tuple[int, int], has_bias: bool) -> Linear:
        matrix = self.matrices[self.packed.header.tied.get(name, name)]
        if (matrix.out, matrix.columns) != shape:
            raise _misfit(self.packed, name)
        settings = self.packed.header.settings
        scale = None if settings["activation_bits"] == 16 else self.input_scales.get(f"{name}.{INPUT_SCALE}")
        bias = self.vector(f"{name}.bias", shape[0]) if has_bias else None
        return Linear(matrix, bias, settings["group_size"], scale)  # type: ignore[arg-type]

    def norm(self, name: str, features: int) -> Norm:
        family = self.family
        epsilon = family.epsilon if isinstance(family.epsilon, float) else getattr(self.config, family.epsilon)
        return Norm(family.kind, float(epsilon), *(self.vector(f"{name}.{each}", features) for each in family.affine))

    def vector(self, name: str, size: int) -> Tensor:
        """A norm's or a layer's parameter, float32."""
        if name not in self.others:
            raise UserError(f"{self.packed.folder} lacks the tensor {name}.", "Pack the model again.")
        found = self.others[name]
        if tuple(found.shape) != (size,) or not found.is_floating_point():
            raise _misfit(self.packed, name)
        # A copy: the file may change later, and where another program has rewritten it, numbers begin anywhere.
        return found.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def _misfit(packed: PackedModel, name: str) -> UserError:
    return UserError(
        f"{packed.folder}: {name} has no place in the architecture of config.json; they do not belong together.",
        "Pack the model again.",
    )
