"""The native decoder's network, built from a packed model: its matrices, norms and biases in their places.

What is special about the architecture is in its file in `edgerazor/families`; sizes come from the configuration.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from edgerazor import families, kernels
from edgerazor.errors import UserError, plain
from edgerazor.families import EMBEDDING, HEAD, KvHeads, Mixer, NativeArchitecture
from edgerazor.formats import INPUT_SCALE
from edgerazor.kernels import decoder, native
from edgerazor.kernels.decoder import (
    Convolution,
    Expert,
    Experts,
    GatedDeltaRule,
    Layer,
    LayerInputs,
    Linear,
    Mamba2,
    Network,
    Norm,
    ShortConvolution,
)
from edgerazor.packed import PackedModel, has_zero_points
from edgerazor.runtime.rope import Rotary

_NORM_KINDS = {"rms": decoder.RMS, "layer": decoder.LAYER}
#: Activation functions of transformers -> the decoder's.
_ACTIVATIONS = {
    **{"silu": "silu", "swish": "silu", "relu2": "relu_squared"},
    **dict.fromkeys(("gelu_pytorch_tanh", "gelu_new", "gelu_accurate", "gelu_fast"), "gelu_tanh"),
}
#: Parameters of mixers that are no linear layers.
_CONVOLUTION, _DELTA_RULE, _MAMBA2 = "conv.conv", "linear_attn", "mamba"
#: Linear layers that have the bias settings of attention's inputs, of its output, and of the MLP.
_QKV_PLACES, _MLP_PLACES = ("q", "k", "v", "qkv"), ("gate", "up", "gate_up", "down")
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
    if (activation := family.native.activation(config)) not in _ACTIVATIONS:
        raise NotNativeError(f"there is no native code for the activation function {plain(activation, 50)}")
    if unsupported := family.native.unsupported(config):
        raise NotNativeError(f"there is no native code for {unsupported}")
    _check_settings(packed)
    _check_matrices(config, family.native, packed)
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


def _check_matrices(config: Any, architecture: NativeArchitecture, packed: PackedModel) -> None:
    """Make sure that the quantized matrices are exactly those of the architecture."""
    for layer in range(config.num_hidden_layers):  # before so many names are made
        experts = architecture.experts(config, layer)
        if experts is not None and experts.count > len(packed.header.matrices):
            raise UserError(
                f"{packed.folder}: config.json says that there are {experts.count} experts, but there are not the "
                "weights of so many.",
                "Undo the change, or pack the model again.",
            )
    names = {*matrix_names(config, architecture, packed)}
    for name in sorted(names - packed.header.matrices.keys()):
        if f"{name}.weight" in packed.header.others:
            raise NotNativeError(f"its matrix {name} is not quantized")
        raise UserError(f"{packed.folder} lacks the tensor {name}.weight.", "Pack the model again.")
    for name in sorted(packed.header.matrices.keys() - names):
        raise _does_not_fit(packed, name)


def matrix_names(config: Any, architecture: NativeArchitecture, packed: PackedModel) -> list[str]:
    """The matrices of a model, in the order in which a token meets them, those of which it reads a row last."""
    names = [
        f"model.layers.{layer}.{name}"
        for layer in range(config.num_hidden_layers)
        for name in architecture.names_of(config, layer)
    ]
    head = packed.header.tied.get(HEAD, HEAD)
    return [*names, head, *tables(config, architecture, packed)]


def tables(config: Any, architecture: NativeArchitecture, packed: PackedModel) -> list[str]:
    """The matrices of which a token reads a row alone."""
    inputs = architecture.layer_inputs(config)
    return [*([inputs.table] if inputs else []), *([] if packed.header.tied.get(HEAD) == EMBEDDING else [EMBEDDING])]


def build_network(
    config: Any,
    architecture: NativeArchitecture,
    packed: PackedModel,
    matrices: Mapping[str, native.Matrix],
    rotary: Rotary,
) -> Network:
    """Describe the whole decoder for the native library.

    Args:
        config: of transformers.
        architecture: of the model.
        packed: where norms, biases and settings are.
        matrices: of all names of `matrix_names`.
        rotary: its positions.

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
        *architecture.kv_heads(config, 0),
        architecture.intermediate_size(config, 0),
        embedding,
        head,
        builder.norm(architecture.final_norm, config.hidden_size),
        [builder.layer(number, rotary) for number in range(config.num_hidden_layers)],
        rotary.features,
        activation_bits=settings["activation_bits"],  # type: ignore[arg-type]
        kv_bits=settings["kv_bits"],  # type: ignore[arg-type]
        norm_all_heads=architecture.norm_all_heads,
        attention_scale=architecture.attention_scale(config),
        embedding_scale=architecture.embedding_scale(config),
        logit_scale=architecture.logit_scale(config),
        residual_scale=architecture.residual_scale(config),
        attention_soft_cap=architecture.attention_soft_cap(config),
        logit_soft_cap=architecture.logit_soft_cap(config),
        rope_tables=len(rotary.names),
        norm_after_rope=architecture.norm_after_rope,
        layer_inputs=builder.layer_inputs(),
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
        self.inputs = architecture.layer_inputs(config)
        self.others = packed.others()
        self.input_scales = packed.input_scales()

    def layer(self, number: int, rotary: Rotary) -> Layer:
        """A decoder layer; its `rope_dim` is 0 where it leaves RoPE out."""
        architecture, config, prefix = self.architecture, self.config, f"model.layers.{number}"
        mixer = architecture.mixer(config, number)
        kv, source = architecture.kv_heads(config, number), architecture.kv_source(config, number)
        inner = architecture.intermediate_size(config, number)
        shapes = {**self._attention_shapes(kv), **self._mlp_shapes(inner), **self._mixer_shapes(mixer)}
        linears: dict[str, Any] = {
            place: self.linear(f"{prefix}.{name}", shapes[place], self._has_bias(place, mixer))
            for place, name in architecture.linears_of(config, number).items()
        }
        norms: dict[str, Any] = {
            place: self.norm(f"{prefix}.{name}", self._norm_width(place, kv))
            for place, name in architecture.norms.items()
            if self._has_norm(place, mixer, source)
        }
        if architecture.value_norm and source is None:
            norms["v_norm"] = Norm(decoder.RMS, self._norm_epsilon())
        parts: dict[str, Any] = {"mixer": self._mixer(mixer, prefix, linears)} if mixer != "attention" else {}
        if (experts := architecture.experts(config, number)) is not None:
            parts["experts"] = self._experts(experts, prefix)
        places: dict[str, Any] = {
            name: linears.get(name)
            for name in ("q", "k", "v", "o", "gate", "up", "down", "attention_gate", "input_gate", "input_o")
        }
        places["q"] = linears.get("q", linears.get("qkv"))
        places["gate"] = linears.get("gate", linears.get("gate_up"))
        window = architecture.window(config, number)
        return Layer(
            **places,
            **norms,
            **parts,
            rope_dim=rotary.features_of(number) if architecture.has_rope(config, number) else 0,
            rope_table=rotary.table_of(number),
            kv_source=source,
            num_kv_heads=kv.heads,
            head_dim=kv.width,
            intermediate_size=inner,
            output_scale=self._output_scale(prefix),
            sliding_window=window or 0,
            activation=_ACTIVATIONS[architecture.activation(config)],
            gated_queries=architecture.gated_queries and mixer == "attention",
        )

    def _mixer(
        self, mixer: Mixer, prefix: str, linears: Mapping[str, Linear]
    ) -> ShortConvolution | GatedDeltaRule | Mamba2:
        """A mixer that is no attention."""
        config = self.config
        if mixer == "short_convolution":
            channels, bias = config.hidden_size, bool(config.conv_bias)
            convolution = self.convolution(f"{prefix}.{_CONVOLUTION}", channels, config.conv_L_cache, bias)
            return ShortConvolution(linears["inputs"], convolution)
        if mixer == "mamba2":
            return self._mamba2(f"{prefix}.{_MAMBA2}", linears["inputs"])
        name, heads, qkv = f"{prefix}.{_DELTA_RULE}", config.linear_num_value_heads, linears["qkv"]
        return GatedDeltaRule(
            qkv,
            linears["z"],
            linears["beta"],
            linears["alpha"],
            self.convolution(f"{name}.conv1d", qkv.matrix.out, config.linear_conv_kernel_dim, False),
            -self.vector(f"{name}.A_log", heads).exp(),
            self.vector(f"{name}.dt_bias", heads),
            self.norm(f"{name}.norm", config.linear_value_head_dim, 0.0),
            config.linear_num_key_heads,
            heads,
            config.linear_key_head_dim,
            config.linear_value_head_dim,
        )

    def _mamba2(self, name: str, inputs: Linear) -> Mamba2:
        """The mixer of that name."""
        config = self.config
        heads, groups, state = config.mamba_n_heads, config.mamba_n_groups, config.mamba_d_state
        width = heads * config.mamba_d_head
        least, most = config.time_step_limit or (0.0, math.inf)
        return Mamba2(
            inputs,
            self.convolution(
                f"{name}.conv1d", width + 2 * groups * state, config.mamba_d_conv, bool(config.mamba_conv_bias)
            ),
            -self.vector(f"{name}.A_log", heads).exp(),
            self.vector(f"{name}.dt_bias", heads),
            self.vector(f"{name}.D", heads),
            self.norm(f"{name}.norm", width, 0.0),
            groups,
            heads,
            config.mamba_d_head,
            state,
            float(least),
            float(most),
        )

    def layer_inputs(self) -> LayerInputs | None:
        """What single layers get beside the residual stream."""
        inputs, config = self.inputs, self.config
        if inputs is None:
            return None
        width = config.num_hidden_layers * inputs.features
        projection = self.tensor(f"{inputs.projection}.weight", (width, config.hidden_size), half=True)
        return LayerInputs(
            inputs.features,
            self.linear(inputs.table, (config.vocab_size, width), False),
            projection,
            self.norm(inputs.norm, inputs.features),
            inputs.table_scale,
            inputs.projection_scale,
            inputs.scale,
        )

    def _output_scale(self, prefix: str) -> float:
        """A factor of the residual stream behind a layer."""
        name = self.architecture.output_scale
        return float(self.vector(f"{prefix}.{name}", 1)) if name else 1.0

    def _has_norm(self, place: str, mixer: Mixer, kv_source: int | None) -> bool:
        """Whether a layer with that mixer, and keys and values from there, has a norm of the architecture."""
        if place == "after_input":
            return self.inputs is not None
        return place not in _QK_NORM_PLACES or (mixer == "attention" and (place == "q_norm" or kv_source is None))

    def _experts(self, experts: families.Experts, prefix: str) -> Experts:
        """A mixture of experts; its router is no packed matrix."""
        hidden, inner = self.config.hidden_size, experts.intermediate_size
        shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
        return Experts(
            [
                Expert(*(self.linear(f"{prefix}.{name}", shapes[place], False) for place, name in linears.items()))
                for linears in experts.linears()
            ],
            self.tensor(f"{prefix}.{experts.router}.weight", (experts.count, hidden)),
            experts.chosen,
            experts.scores == "sigmoid",
            experts.normalized,
            experts.epsilon,
            experts.scale,
            self.vector(f"{prefix}.{experts.choice_bias}", experts.count) if experts.choice_bias else None,
            self.vector(f"{prefix}.{experts.factors}", experts.count) if experts.factors else None,
            self._router_norm(experts, prefix),
            **{place: self.norm(f"{prefix}.{name}", hidden) for place, name in experts.norms.items()},
        )

    def _router_norm(self, experts: families.Experts, prefix: str) -> Norm | None:
        """The norm of what a router alone gets."""
        if not experts.router_gains:
            return None
        gains = self.vector(f"{prefix}.{experts.router_gains}", self.config.hidden_size)
        return Norm(decoder.RMS, self._norm_epsilon(), gains * experts.router_scale)

    def _attention_shapes(self, kv: KvHeads) -> dict[str, tuple[int, int]]:
        """Rows and columns of the linear layers of attention."""
        config = self.config
        query, key = config.num_attention_heads * kv.width, kv.heads * kv.width
        hidden, rows = config.hidden_size, query * (2 if self.architecture.gated_queries else 1)
        shapes = {"q": (rows, hidden), "k": (key, hidden), "v": (key, hidden), "o": (hidden, query)}
        return shapes | {"qkv": (query + 2 * key, hidden), "attention_gate": (config.num_attention_heads, hidden)}

    def _mlp_shapes(self, inner: int) -> dict[str, tuple[int, int]]:
        """Rows and columns of the linear layers of the MLP, and of a layer's own input."""
        hidden, features = self.config.hidden_size, self.inputs.features if self.inputs else 0
        of_mlp = {"gate": (inner, hidden), "up": (inner, hidden), "gate_up": (2 * inner, hidden)}
        of_input = {"input_gate": (features, hidden), "input_o": (hidden, features)}
        return {**of_mlp, "down": (hidden, inner), **of_input}

    def _mixer_shapes(self, mixer: Mixer) -> dict[str, tuple[int, int]]:
        """Rows and columns of the linear layers of a mixer that is no attention."""
        config = self.config
        hidden = config.hidden_size
        if mixer == "short_convolution":
            return {"inputs": (3 * hidden, hidden), "o": (hidden, hidden)}
        if mixer == "gated_delta_rule":
            heads = config.linear_num_value_heads
            keys, values = (
                config.linear_num_key_heads * config.linear_key_head_dim,
                heads * config.linear_value_head_dim,
            )
            shapes = {"qkv": (2 * keys + values, hidden), "z": (values, hidden), "o": (hidden, values)}
            return shapes | {"beta": (heads, hidden), "alpha": (heads, hidden)}
        if mixer == "mamba2":
            heads, states = config.mamba_n_heads, 2 * config.mamba_n_groups * config.mamba_d_state
            width = heads * config.mamba_d_head
            return {"inputs": (2 * width + states + heads, hidden), "o": (hidden, width)}
        return {}

    def _has_bias(self, place: str, mixer: Mixer) -> bool:
        """Whether a linear layer of a decoder layer has a bias."""
        architecture, config = self.architecture, self.config
        if place in _MLP_PLACES:
            return architecture.mlp_bias(config)
        if mixer == "mamba2":
            return bool(config.mamba_proj_bias)
        if mixer != "attention":
            return mixer == "short_convolution" and bool(config.conv_bias)
        if place in _QKV_PLACES:
            return architecture.qkv_bias(config)
        return place == "o" and architecture.o_bias(config)

    def _norm_width(self, place: str, kv: KvHeads) -> int:
        """Features of a norm of a decoder layer."""
        config = self.config
        if place not in _QK_NORM_PLACES:
            return int(config.hidden_size)
        heads = config.num_attention_heads if place == "q_norm" else kv.heads
        return int(kv.width * (heads if self.architecture.norm_all_heads else 1))

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

    def norm(self, name: str, features: int, offset: float | None = None) -> Norm:
        """A norm of so many features; `offset`: what is added to its gains, None for the architecture's."""
        architecture = self.architecture
        parameters = [self.vector(f"{name}.{parameter}", features) for parameter in architecture.norm_parameters]
        if offset := architecture.norm_offset if offset is None else offset:
            parameters[0] += offset
        return Norm(_NORM_KINDS[architecture.norm_kind], self._norm_epsilon(), *parameters)

    def _norm_epsilon(self) -> float:
        epsilon = self.architecture.norm_epsilon
        return epsilon if isinstance(epsilon, float) else float(getattr(self.config, epsilon))

    def convolution(self, name: str, features: int, kernel: int, has_bias: bool) -> Convolution:
        """A convolution with a filter of so many weights for each feature."""
        weight = self.tensor(f"{name}.weight", (features, 1, kernel)).view(features, kernel)
        return Convolution(weight.T.contiguous(), self.vector(f"{name}.bias", features) if has_bias else None)

    def vector(self, name: str, size: int) -> Tensor:
        """A norm's or a layer's parameter, float32 [size]."""
        return self.tensor(name, (size,))

    def tensor(self, name: str, shape: tuple[int, ...], half: bool = False) -> Tensor:
        """A parameter that is no packed matrix, float32; with `half`, one in bfloat16 stays so."""
        if name not in self.others:
            raise UserError(f"{self.packed.folder} lacks the tensor {name}.", "Pack the model again.")
        tensor = self.others[name]
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            raise _does_not_fit(self.packed, name)
        # A copy: the file may change later, and where another program has rewritten it, numbers begin anywhere.
        dtype = torch.bfloat16 if half and tensor.dtype == torch.bfloat16 else torch.float32
        return tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _does_not_fit(packed: PackedModel, name: str) -> UserError:
    return UserError(
        f"{packed.folder}: {name} has no place in the architecture of config.json; they do not belong together.",
        "Pack the model again.",
    )
