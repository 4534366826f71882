"""The native decoder's network, built from a packed model: its matrices, norms and biases in their places.

What is special about the architecture is in its file in `edgerazor/families`; sizes come from the configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from edgerazor import families, kernels
from edgerazor.errors import UserError, plain
from edgerazor.families import EMBEDDING, FINAL_NORM, HEAD, LINEARS, NativeArchitecture
from edgerazor.formats import INPUT_SCALE
from edgerazor.kernels import decoder, native
from edgerazor.kernels.decoder import Layer, Linear, Network, Norm
from edgerazor.packed import PackedModel, has_zero_points

_NORM_KINDS = {"rms": decoder.RMS, "layer": decoder.LAYER}
#: Norms of queries and keys, whose width is that of a head or of all heads; all others are as wide as the model.
_QK_NORM_PLACES = ("q_norm", "k_norm")


class NotNativeError(Exception):
    """The native engine cannot compute a model; the message ends a sentence that says so."""

    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.reason, self.hint = reason, hint


def native_architecture(config: Any, packed: PackedModel) -> NativeArchitecture:
    """The architecture of a packed model, if the native engine computes it on this machine.

    Args:
        config: of transformers.
        packed: the model.

    Raises:
        NotNativeError: the native engine does not compute it.
        UserError: `EDGERAZOR_ISA` asks for kernels that there are not, or the packed model lacks a tensor or has one
            too many.
    """
    _check_kernels()
    family = families.find(config.model_type)
    if family is None or family.native is None:
        raise NotNativeError(f"there is no native code for models of type {config.model_type}")
    if config.hidden_act != "silu":
        raise NotNativeError(f"there is no native code for the activation function {plain(config.hidden_act, 50)}")
    if unsupported := family.native.unsupported(config):
        raise NotNativeError(f"there is no native code for {unsupported}")
    _check_settings(packed)
    _check_matrices(config, packed)
    return family.native


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
    for name in packed.header.matrices:
        if problem := packed.spec(name).native_problem():
            raise NotNativeError(f"there is no native code for {problem}, as in {name}")


def _check_matrices(config: Any, packed: PackedModel) -> None:
    """Make sure that the quantized matrices are exactly those of the architecture."""
    names = {*matrix_names(config, packed)}
    for name in sorted(names - packed.header.matrices.keys()):
        if f"{name}.weight" in packed.header.others:
            raise NotNativeError(f"its matrix {name} is not quantized")
        raise UserError(f"{packed.folder} lacks the tensor {name}.weight.", "Pack the model again.")
    for name in sorted(packed.header.matrices.keys() - names):
        raise _does_not_fit(packed, name)


def matrix_names(config: Any, packed: PackedModel) -> list[str]:
    """The matrices of a model, in the order in which a token meets them, the embedding of which it reads a row last."""
    layers = range(config.num_hidden_layers)
    names = [f"model.layers.{layer}.{name}" for layer in layers for name in LINEARS.values()]
    head = packed.header.tied.get(HEAD, HEAD)
    return [*names, head, *([] if head == EMBEDDING else [EMBEDDING])]


def build_network(
    config: Any,
    architecture: NativeArchitecture,
    packed: PackedModel,
    matrices: Mapping[str, native.Matrix],
    rotary_features: int,
) -> Network:
    """Describe the whole decoder for the native library.

    Args:
        config: of transformers.
        architecture: of the model.
        packed: where norms, biases and settings are.
        matrices: of all names of `matrix_names`.
        rotary_features: of a head that RoPE rotates.

    Raises:
        UserError: a tensor is missing or damaged, or has another shape than the configuration says.
    """
    builder = _NetworkBuilder(config, architecture, packed, matrices)
    settings = packed.header.settings
    embedding = builder.linear(EMBEDDING, (config.vocab_size, config.hidden_size), False)
    head = builder.linear(HEAD, (config.vocab_size, config.hidden_size), False)
    return Network(
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        builder.head_dim,
        config.intermediate_size,
        embedding,
        head,
        builder.norm(FINAL_NORM, config.hidden_size),
        [builder.layer(number, rotary_features) for number in range(config.num_hidden_layers)],
        rotary_features,
        activation_bits=settings["activation_bits"],  # type: ignore[arg-type]
        kv_bits=settings["kv_bits"],  # type: ignore[arg-type]
        norm_all_heads=architecture.norm_all_heads,
        attention_scale=builder.head_dim**-0.5,
    )


class _NetworkBuilder:
    """Makes the parts of a network; arguments as of `build_network`."""

    def __init__(
        self,
        config: Any,
        architecture: NativeArchitecture,
        packed: PackedModel,
        matrices: Mapping[str, native.Matrix],
    ) -> None:
        self.config, self.architecture, self.packed, self.matrices = config, architecture, packed, matrices
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.others = packed.others()
        self.input_scales = packed.input_scales()

    def layer(self, number: int, rotary_features: int) -> Layer:
        """A decoder layer; `rotary_features` is 0 in its result where the layer leaves RoPE out."""
        architecture, prefix = self.architecture, f"model.layers.{number}"
        shapes, has_bias = self._linear_shapes(), self._linear_biases()
        linears: dict[str, Any] = {
            place: self.linear(f"{prefix}.{name}", shapes[place], has_bias[place]) for place, name in LINEARS.items()
        }
        norms: dict[str, Any] = {
            place: self.norm(f"{prefix}.{name}", self._norm_width(place)) for place, name in architecture.norms.items()
        }
        window = architecture.window(self.config, number)
        rotated = rotary_features if architecture.has_rope(self.config, number) else 0
        return Layer(**linears, **norms, rope_dim=rotated, sliding_window=window or 0)

    def _linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Rows and columns of the linear layers of a decoder layer."""
        config = self.config
        query, key = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        hidden, inner = config.hidden_size, config.intermediate_size
        shapes = {"q": (query, hidden), "k": (key, hidden), "v": (key, hidden), "o": (hidden, query)}
        return shapes | {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}

    def _linear_biases(self) -> dict[str, bool]:
        """Whether the linear layers of a decoder layer have biases."""
        architecture = self.architecture
        qkv, mlp = architecture.qkv_bias(self.config), architecture.mlp_bias(self.config)
        biases = {**dict.fromkeys("qkv", qkv), "o": architecture.o_bias(self.config)}
        return biases | dict.fromkeys(("gate", "up", "down"), mlp)

    def _norm_width(self, place: str) -> int:
        """Features of a norm of a decoder layer."""
        config = self.config
        if place not in _QK_NORM_PLACES:
            return int(config.hidden_size)
        heads = config.num_attention_heads if place == "q_norm" else config.num_key_value_heads
        return int(self.head_dim * (heads if self.architecture.norm_all_heads else 1))

    def linear(self, name: str, shape: tuple[int, int], has_bias: bool) -> Linear:
        """A linear layer, whose matrix must have that shape."""
        matrix = self.matrices[self.packed.header.tied.get(name, name)]
        if (matrix.out, matrix.columns) != shape:
            raise _does_not_fit(self.packed, name)
        settings = self.packed.header.settings
        scale = None if settings["activation_bits"] == 16 else self.input_scales.get(f"{name}.{INPUT_SCALE}")
        bias = self.vector(f"{name}.bias", shape[0]) if has_bias else None
        rotation = self.packed.rotation(shape[1])
        return Linear(matrix, bias, settings["group_size"], scale, rotation)  # type: ignore[arg-type]

    def norm(self, name: str, features: int) -> Norm:
        """A norm of so many features."""
        architecture = self.architecture
        epsilon = architecture.norm_epsilon
        epsilon = epsilon if isinstance(epsilon, float) else getattr(self.config, epsilon)
        parameters = (self.vector(f"{name}.{parameter}", features) for parameter in architecture.norm_parameters)
        return Norm(_NORM_KINDS[architecture.norm_kind], float(epsilon), *parameters)

    def vector(self, name: str, size: int) -> Tensor:
        """A norm's or a layer's parameter, float32."""
        if name not in self.others:
            raise UserError(f"{self.packed.folder} lacks the tensor {name}.", "Pack the model again.")
        tensor = self.others[name]
        if tuple(tensor.shape) != (size,) or not tensor.is_floating_point():
            raise _does_not_fit(self.packed, name)
        # A copy: the file may change later, and where another program has rewritten it, numbers begin anywhere.
        return tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def _does_not_fit(packed: PackedModel, name: str) -> UserError:
    return UserError(
        f"{packed.folder}: {name} has no place in the architecture of config.json; they do not belong together.",
        "Pack the model again.",
    )
