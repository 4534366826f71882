"""The decoder of the kernel library, through ctypes: a whole transformer with its KV cache and its thread pool.

Arguments are checked here; the C++ code trusts them (`cpp/decoder.h` says what it computes, and `cpp/decoder.cpp` draws
one token's way through it).
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import math
import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from ctypes import POINTER, Structure, c_float, c_int, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgerazor.errors import MOST_THREADS
from edgerazor.formats import SMALLEST, Rotation
from edgerazor.kernels import native
from edgerazor.kernels.memory import physical_memory
from edgerazor.kernels.native import LARGEST, NotFiniteError

__all__ = [
    "ACTIVATIONS",
    "PAGE_SLOTS",
    "RMS",
    "SLOT_ALIGNMENT",
    "Convolution",
    "Decoder",
    "Expert",
    "Experts",
    "GatedDeltaRule",
    "Layer",
    "LayerInputs",
    "Linear",
    "Mamba2",
    "Network",
    "Norm",
    "NotFiniteError",
    "OtherProcessError",
    "PageTable",
    "PagedSpan",
    "SequenceSpan",
    "ShortConvolution",
    "align_slot",
]

#: The first KV slot of a sequence is a multiple of this.
SLOT_ALIGNMENT = 16
#: KV slots of a page of a page table; page p has the slots from p times this on.
PAGE_SLOTS = 64
#: Kinds of norms.
NO_NORM, RMS, LAYER = 0, 1, 2
#: Activation functions of MLPs, by the number that the library knows them by.
ACTIVATIONS = ("silu", "gelu_tanh", "relu_squared")
#: Tokens that a convolution may see, many more than any model's.
MOST_TAPS = 1 << 10
#: Experts of a layer, many more than any model's.
MOST_EXPERTS = 1 << 13
#: Rows of a matrix that is not packed that lie side by side.
_ROW_BLOCK = 16
#: The state slot of a sequence that has no tokens yet.
NO_STATE = -1


class OtherProcessError(RuntimeError):
    """The decoder was created in another process: a fork copies its memory, but not its threads."""


_OK, _NO_MEMORY, _NOT_FINITE = 0, 1, 2


@dataclass(frozen=True, eq=False)
class Linear:
    """A linear layer, `y = W x + bias`.

    Attributes:
        matrix: W [rows, columns].
        bias: float32 [rows].
        activation_group: features of x that share a scale.
        scale: static scale of all of x; None computes one for each group of each token.
        rotation: of the columns of W; x is rotated likewise before it is rounded. None: there is none.
    """

    matrix: native.Matrix
    bias: Tensor | None = None
    activation_group: int = 256
    scale: float | None = None
    rotation: Rotation | None = None

    @property
    def row_layout(self) -> native.RowLayout:
        """The layout of the matrix for these groups of activations."""
        static = self.scale is not None
        return self.matrix.row_layout(self.matrix.columns if static else self.activation_group)


@dataclass(frozen=True, eq=False)
class Norm:
    """An RMSNorm or LayerNorm.

    Attributes:
        kind: `RMS` or `LAYER`.
        epsilon: added to the mean square, or to the variance.
        weight: float32 [features]; None for ones.
        bias: float32 [features]; None for zeros. A LayerNorm alone has one.
    """

    kind: int
    epsilon: float
    weight: Tensor | None = None
    bias: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Convolution:
    """A causal convolution with a filter for each feature.

    Attributes:
        weight: float32 [kernel, features]; the last row is for a token itself, the row before for the token before it.
        bias: float32 [features].
    """

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True, eq=False)
class ShortConvolution:
    """The mixer `o(c * convolution(b * y))`, where b, c and y are the rows of one matrix."""

    inputs: Linear
    convolution: Convolution


@dataclass(frozen=True, eq=False)
class GatedDeltaRule:
    """The gated delta rule (Gated DeltaNet, arXiv 2412.06464), with a convolution over q, k and v.

    Attributes:
        qkv: all queries, all keys, all values.
        z, beta, alpha: of the gate of the result, of the change of the state, and of its decay.
        decay: minus exp(A_log), float32 [value_heads].
        decay_bias: dt_bias, float32 [value_heads].
        state_norm: of a value head.
        key_heads, value_heads, key_dim, value_dim: as many value heads share a key head as there are more of them.
    """

    qkv: Linear
    z: Linear
    beta: Linear
    alpha: Linear
    convolution: Convolution
    decay: Tensor
    decay_bias: Tensor
    state_norm: Norm
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True, eq=False)
class Mamba2:
    """The state space model of Mamba-2 (arXiv 2405.21060), with a convolution over x, B and C.

    Attributes:
        inputs: z, x, B and C of all groups, and a step for each head.
        decay: minus exp(A_log), float32 [heads].
        step_bias: dt_bias, float32 [heads].
        skip: D, the factor of x in the result, float32 [heads].
        norm: of the heads of a group together, with gains of all heads.
        groups, heads, head_dim, state_size: as many heads share B and C as there are more of them than groups.
        least_step, most_step: bounds of steps.
    """

    inputs: Linear
    convolution: Convolution
    decay: Tensor
    step_bias: Tensor
    skip: Tensor
    norm: Norm
    groups: int
    heads: int
    head_dim: int
    state_size: int
    least_step: float = 0.0
    most_step: float = math.inf


@dataclass(frozen=True, eq=False)
class Expert:
    """A gated MLP, one of several."""

    gate: Linear
    up: Linear
    down: Linear

    @property
    def linears(self) -> tuple[Linear, Linear, Linear]:
        """Its matrices."""
        return self.gate, self.up, self.down


@dataclass(frozen=True, eq=False)
class Experts:
    """A mixture of experts, like `edgerazor_experts` of `cpp/decoder.h`.

    Attributes:
        experts: matrices of the same sizes and groups, without biases.
        router: a row for each expert, float32 [experts, hidden_size].
        chosen: how many compute a token.
        sigmoid: scores are sigmoids of what the router gives, not a softmax over all experts.
        normalized: weights are the scores of the chosen experts over their sum plus `epsilon`, not the scores.
        scale: a factor of the weights.
        choice_bias: what is added to scores to choose experts by, float32 [experts].
        factors: of the weights of each expert, float32 [experts].
        router_norm: of the residual stream, for the router alone.
        before: of the residual stream, for experts, where it is not `before_mlp` of the layer.
        after, after_mlp_alone: of what experts give, and an MLP beside them, before both are added up.
    """

    experts: Sequence[Expert]
    router: Tensor
    chosen: int
    sigmoid: bool = False
    normalized: bool = False
    epsilon: float = 0.0
    scale: float = 1.0
    choice_bias: Tensor | None = None
    factors: Tensor | None = None
    router_norm: Norm | None = None
    before: Norm | None = None
    after: Norm | None = None
    after_mlp_alone: Norm | None = None


@dataclass(frozen=True, eq=False)
class LayerInputs:
    """Inputs that single layers get beside the residual stream, like `edgerazor_layer_inputs` of `cpp/decoder.h`.

    Attributes:
        features: of the input of a layer.
        table: a row for each token, [vocab_size, layers * features].
        projection: of the token's embedding, float32 or bfloat16 [layers * features, hidden_size].
        norm: of each layer's part of that.
        table_scale, projection_scale: factors of the rows of the table, and of what the projection gives.
        scale: a factor of the sum of both.
    """

    features: int
    table: Linear
    projection: Tensor
    norm: Norm | None = None
    table_scale: float = 1.0
    projection_scale: float = 1.0
    scale: float = 1.0


def rows_by_sixteen(matrix: Tensor) -> Tensor:
    """A matrix that is not packed as the library reads it: [rows, columns] becomes [rows / 16 rounded up, columns, 16],
    padded with zeros."""
    count, features = matrix.shape
    blocks = -(-count // _ROW_BLOCK)
    padded = torch.zeros(blocks * _ROW_BLOCK, features, dtype=matrix.dtype)
    padded[:count] = matrix
    return padded.view(blocks, _ROW_BLOCK, features).transpose(1, 2).contiguous()


@dataclass(frozen=True, eq=False)
class Layer:
    """A decoder layer, like `edgerazor_layer` of `cpp/decoder.h`; None stands for a part that it does not have.

    A layer without `k` and `v` has all three in `q`, and one without `v` the values in `k`; one without `up` has gate
    and up in `gate`, and one without `gate` has an MLP with an activation function alone; one with `experts` has a
    whole MLP beside them, or none of its matrices.

    Attributes:
        v_norm: of each head of values.
        kv_source: number of the earlier layer, with its own keys and values, that it attends to those of; it has
            neither `k` nor `v` then. None: it has its own.
        num_kv_heads, head_dim, intermediate_size: as of the network, where they are not its.
        input_gate, input_o: of the layer's own input, `input_o(activation(input_gate(x)) * input)`.
        after_input: the norm of that.
        output_scale: a factor of the residual stream behind the layer.
        mixer: what is there instead of attention, whose matrices are then None.
        attention_gate: with a row for each head, or for each feature of all heads: a sigmoid is a factor of attention.
        gated_queries: the rows of `q` are, head by head, those of the query and those of such a gate.
        rope_dim: leading features of a head that RoPE rotates; 0: none.
        rope_table: number of the layer's table of cosines and sines.
        sliding_window: latest positions that a token attends to, its own among them; 0: all.
        activation: one of `ACTIVATIONS`.
    """

    q: Linear | None
    k: Linear | None
    v: Linear | None
    o: Linear
    gate: Linear | None
    up: Linear | None
    down: Linear | None
    before_attention: Norm | None = None
    after_attention: Norm | None = None
    before_mlp: Norm | None = None
    after_mlp: Norm | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    v_norm: Norm | None = None
    rope_dim: int = 0
    sliding_window: int = 0
    rope_table: int = 0
    activation: str = "silu"
    attention_gate: Linear | None = None
    gated_queries: bool = False
    mixer: ShortConvolution | GatedDeltaRule | Mamba2 | None = None
    experts: Experts | None = None
    kv_source: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
    input_gate: Linear | None = None
    input_o: Linear | None = None
    after_input: Norm | None = None
    output_scale: float = 1.0

    @property
    def inputs(self) -> tuple[Linear | None, ...]:
        """The matrices whose products a mixer mixes, in the order of `edgerazor_layer`."""
        if isinstance(self.mixer, ShortConvolution | Mamba2):
            return self.mixer.inputs, None, None, None
        if isinstance(self.mixer, GatedDeltaRule):
            return self.mixer.qkv, self.mixer.z, self.mixer.beta, self.mixer.alpha
        return self.q, self.k, self.v, self.attention_gate


@dataclass(frozen=True, eq=False)
class Network:
    """All layers of a decoder, like `edgerazor_model` of `cpp/decoder.h`.

    Attributes:
        residual_scale: of what a mixer or an MLP adds to the residual stream.
        attention_soft_cap, logit_soft_cap: x becomes cap * tanh(x / cap), where the cap is not 0.
        num_kv_heads, head_dim, intermediate_size: of layers that do not say otherwise.
        rope_dim: rotated features that the tables of cosines and sines have room for, at most those of a head.
        rope_tables: how many of these tables there are.
        layer_inputs: what single layers get beside the residual stream.
        norm_after_rope: norms of queries and keys come after RoPE.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    embedding: Linear
    head: Linear
    final_norm: Norm | None
    layers: Sequence[Layer]
    rope_dim: int
    activation_bits: int = 8
    kv_bits: int = 8
    norm_all_heads: bool = False
    attention_scale: float = 1.0
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    residual_scale: float = 1.0
    attention_soft_cap: float = 0.0
    logit_soft_cap: float = 0.0
    rope_tables: int = 1
    norm_after_rope: bool = False
    layer_inputs: LayerInputs | None = None

    @property
    def has_states(self) -> bool:
        """Whether a layer keeps a state of earlier tokens instead of keys and values."""
        return any(layer.mixer is not None for layer in self.layers)

    @property
    def vocab_size(self) -> int:
        """Number of logits."""
        return self.head.matrix.out

    def kv_slot_bytes(self) -> int:
        """Bytes of a KV slot: the keys and values of one token in all layers with attention, with their scales."""
        heads = [self.kv_heads_of(layer) for layer in self.layers if layer.mixer is None and layer.kv_source is None]
        per_feature = {16: 4.0, 8: 1.0, 4: 0.5}[self.kv_bits]
        scale = 0 if self.kv_bits == 16 else 4
        return sum(2 * count * (math.ceil(per_feature * width) + scale) for count, width in heads)

    def kv_heads_of(self, layer: Layer) -> tuple[int, int]:
        """How many heads of keys and values a layer has, and their width."""
        return layer.num_kv_heads or self.num_kv_heads, layer.head_dim or self.head_dim

    def check(self) -> None:
        """Checks that shapes fit together, numbers are in range, and tensors are float32 and contiguous.

        Raises:
            ValueError: they are not.
        """
        sizes = (self.hidden_size, self.num_heads, self.num_kv_heads, self.head_dim, self.intermediate_size)
        _check_sizes(sizes)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"impossible sizes: {sizes}")
        if self.activation_bits != 16 and not 2 <= self.activation_bits <= 8:
            raise ValueError(f"activations have 2 to 8 or 16 bits, not {self.activation_bits}")
        if self.kv_bits not in (4, 8, 16):
            raise ValueError(f"keys and values have 4, 8 or 16 bits, not {self.kv_bits}")
        widest = max((self.kv_heads_of(layer)[1] for layer in self.layers), default=self.head_dim)
        if self.rope_dim < 0 or self.rope_dim % 2 or self.rope_dim > widest:
            raise ValueError(f"RoPE cannot rotate {self.rope_dim} features of {widest} in pairs")
        scales = (self.attention_scale, self.embedding_scale, self.logit_scale, self.residual_scale)
        if not all(math.isfinite(scale) for scale in scales):
            raise ValueError(f"impossible scales: {scales}")
        if not all(0 <= cap < math.inf for cap in (self.attention_soft_cap, self.logit_soft_cap)):
            raise ValueError(f"impossible soft caps: {self.attention_soft_cap}, {self.logit_soft_cap}")
        if not 1 <= self.rope_tables <= max(1, len(self.layers)):
            raise ValueError(f"{len(self.layers)} layers cannot have {self.rope_tables} tables of positions")
        _check_linear("embedding", self.embedding, (self.head.matrix.out, self.hidden_size))
        _check_linear("head", self.head, (self.head.matrix.out, self.hidden_size))
        _check_norm("final_norm", self.final_norm, self.hidden_size)
        if self.layer_inputs is not None:
            self._check_layer_inputs(self.layer_inputs)
        for number, layer in enumerate(self.layers):
            self._check_layer(layer)
            self._check_kv_source(number, layer)

    def _check_layer_inputs(self, inputs: LayerInputs) -> None:
        width = len(self.layers) * inputs.features
        _check_sizes((inputs.features,))
        _check_linear("table of inputs", inputs.table, (self.head.matrix.out, width))
        projection, shape = inputs.projection, (width, self.hidden_size)
        if projection.dtype not in (torch.float32, torch.bfloat16) or tuple(projection.shape) != shape:
            raise ValueError(f"a projection of inputs must be float32 or bfloat16 {list(shape)}")
        _check_norm("norm of inputs", inputs.norm, inputs.features)
        scales = (inputs.table_scale, inputs.projection_scale, inputs.scale)
        if not all(math.isfinite(scale) for scale in scales):
            raise ValueError(f"impossible scales: {scales}")

    def _check_kv_source(self, number: int, layer: Layer) -> None:
        if layer.kv_source is None:
            return
        if layer.mixer is not None or layer.k is not None or layer.v is not None:
            raise ValueError("a layer that attends to the keys and values of another has none of its own")
        source = self.layers[layer.kv_source] if 0 <= layer.kv_source < number else None
        own = source is not None and source.mixer is None and source.kv_source is None
        if source is None or not own or self.kv_heads_of(source) != self.kv_heads_of(layer):
            raise ValueError(f"layer {number} cannot attend to the keys and values of layer {layer.kv_source}")

    def _check_layer(self, layer: Layer) -> None:
        kv_heads, head_dim = self.kv_heads_of(layer)
        _check_sizes((self.num_heads, kv_heads, head_dim))
        if self.num_heads % kv_heads:
            raise ValueError(f"{self.num_heads} heads cannot share {kv_heads} heads of keys and values")
        query, key = self.num_heads * head_dim, kv_heads * head_dim
        hidden = self.hidden_size
        if isinstance(layer.mixer, ShortConvolution):
            self._check_short_convolution(layer, layer.mixer)
        elif isinstance(layer.mixer, GatedDeltaRule):
            self._check_delta_rule(layer, layer.mixer)
        elif isinstance(layer.mixer, Mamba2):
            self._check_mamba2(layer, layer.mixer)
        else:
            self._check_attention(layer)
        self._check_mlp(layer)
        self._check_own_input(layer)
        for name in ("before_attention", "after_attention", "before_mlp", "after_mlp", "after_input"):
            _check_norm(name, getattr(layer, name), hidden)
        _check_norm("q_norm", layer.q_norm, query if self.norm_all_heads else head_dim)
        _check_norm("k_norm", layer.k_norm, key if self.norm_all_heads else head_dim)
        _check_norm("v_norm", layer.v_norm, head_dim)
        if layer.rope_dim < 0 or layer.rope_dim % 2 or layer.rope_dim > min(self.rope_dim, head_dim):
            most = min(self.rope_dim, head_dim)
            raise ValueError(f"RoPE rotates up to {most} features in pairs in a layer, not {layer.rope_dim}")
        if not 0 <= layer.rope_table < self.rope_tables:
            raise ValueError(f"there is no table {layer.rope_table} of positions")
        if not isinstance(layer.sliding_window, int) or not 0 <= layer.sliding_window <= LARGEST:
            raise ValueError(f"a sliding window cannot have {layer.sliding_window} positions")
        if not math.isfinite(layer.output_scale):
            raise ValueError(f"impossible scale of a layer: {layer.output_scale}")

    def _check_own_input(self, layer: Layer) -> None:
        if layer.input_gate is None and layer.input_o is None:
            return
        if self.layer_inputs is None:
            raise ValueError("a layer has an input that the network does not have")
        features = self.layer_inputs.features
        _check_linear("input_gate", layer.input_gate, (features, self.hidden_size))
        _check_linear("input_o", layer.input_o, (self.hidden_size, features))

    def _check_attention(self, layer: Layer) -> None:
        kv_heads, head_dim = self.kv_heads_of(layer)
        query, key = self.num_heads * head_dim, kv_heads * head_dim
        hidden, own = self.hidden_size, layer.kv_source is None
        fused = own and layer.k is None and layer.v is None
        if fused and (self.norm_all_heads or layer.gated_queries):
            raise ValueError("q, k and v of one matrix have no gates and no norm over all heads")
        rows = query * 2 if layer.gated_queries else query + 2 * key if fused else query
        _check_linear("q", layer.q, (rows, hidden))
        if own and not fused:
            _check_linear("k", layer.k, (key, hidden))
            if layer.v is not None:
                _check_linear("v", layer.v, (key, hidden))
        if (gate := layer.attention_gate) is not None:
            rows = gate.matrix.out
            if rows not in (self.num_heads, query) or layer.gated_queries:
                raise ValueError(f"a gate of attention cannot have {rows} rows")
            _check_linear("attention_gate", gate, (rows, hidden))
        _check_linear("o", layer.o, (hidden, query))
        _check_common_rotation("q", layer.inputs)

    def _check_short_convolution(self, layer: Layer, mixer: ShortConvolution) -> None:
        features = layer.o.matrix.columns
        _check_linear("inputs", mixer.inputs, (3 * features, self.hidden_size))
        _check_convolution(mixer.convolution, features)
        _check_linear("o", layer.o, (self.hidden_size, features))

    def _check_delta_rule(self, layer: Layer, mixer: GatedDeltaRule) -> None:
        hidden, heads = self.hidden_size, mixer.value_heads
        sizes = (mixer.key_heads, heads, mixer.key_dim, mixer.value_dim)
        if not all(isinstance(size, int) and 1 <= size <= LARGEST for size in sizes) or heads % mixer.key_heads:
            raise ValueError(f"impossible sizes: {sizes}")
        keys, values = mixer.key_heads * mixer.key_dim, heads * mixer.value_dim
        _check_linear("qkv", mixer.qkv, (2 * keys + values, hidden))
        _check_linear("z", mixer.z, (values, hidden))
        _check_linear("beta", mixer.beta, (heads, hidden))
        _check_linear("alpha", mixer.alpha, (heads, hidden))
        _check_convolution(mixer.convolution, 2 * keys + values)
        _check_vector("decay", mixer.decay, heads)
        _check_vector("decay_bias", mixer.decay_bias, heads)
        _check_norm("state_norm", mixer.state_norm, mixer.value_dim)
        _check_linear("o", layer.o, (hidden, values))
        _check_common_rotation("qkv", layer.inputs)

    def _check_mamba2(self, layer: Layer, mixer: Mamba2) -> None:
        hidden, heads, width = self.hidden_size, mixer.heads, mixer.heads * mixer.head_dim
        sizes = (mixer.groups, heads, mixer.head_dim, mixer.state_size)
        if not all(isinstance(size, int) and 1 <= size <= LARGEST for size in sizes) or heads % mixer.groups:
            raise ValueError(f"impossible sizes: {sizes}")
        if not 0 <= mixer.least_step <= mixer.most_step:
            raise ValueError(f"steps cannot be from {mixer.least_step} to {mixer.most_step}")
        convolved = width + 2 * mixer.groups * mixer.state_size
        _check_linear("inputs", mixer.inputs, (width + convolved + heads, hidden))
        _check_convolution(mixer.convolution, convolved)
        for name in ("decay", "step_bias", "skip"):
            _check_vector(name, getattr(mixer, name), heads)
        _check_norm("norm", mixer.norm, width)
        _check_linear("o", layer.o, (hidden, width))

    def _check_mlp(self, layer: Layer) -> None:
        hidden, inner = self.hidden_size, layer.intermediate_size or self.intermediate_size
        if layer.activation not in ACTIVATIONS:
            raise ValueError(f"there is no activation function {layer.activation}")
        if layer.experts is not None:
            self._check_experts(layer.experts)
            if layer.gate is None and layer.up is None and layer.down is None:
                return
        if layer.gate is None and layer.up is None:
            raise ValueError("an MLP needs gate or up")
        if layer.gate is not None:
            _check_linear("gate", layer.gate, (inner if layer.up is not None else 2 * inner, hidden))
        if layer.up is not None:
            _check_linear("up", layer.up, (inner, hidden))
        _check_linear("down", layer.down, (hidden, inner))
        _check_common_rotation("gate", (layer.gate, layer.up))

    def _check_experts(self, mixture: Experts) -> None:
        hidden, experts = self.hidden_size, mixture.experts
        if not 1 <= mixture.chosen <= len(experts) <= MOST_EXPERTS:
            raise ValueError(f"impossible: {mixture.chosen} of {len(experts)} experts for a token")
        numbers = (mixture.epsilon, mixture.scale)
        if not all(math.isfinite(number) for number in numbers) or mixture.epsilon < 0:
            raise ValueError(f"impossible weights of experts: {numbers}")
        router = mixture.router
        if router.dtype != torch.float32 or tuple(router.shape) != (len(experts), hidden):
            raise ValueError(f"a router must be float32 {[len(experts), hidden]}, not {list(router.shape)}")
        _check_vector("choice_bias", mixture.choice_bias, len(experts))
        _check_vector("factors", mixture.factors, len(experts))
        for name in _EXPERT_NORMS:
            _check_norm(name, getattr(mixture, name), hidden)
        inner = experts[0].gate.matrix.out
        for expert in experts:
            for name, linear, shape in (
                ("gate of an expert", expert.gate, (inner, hidden)),
                ("up of an expert", expert.up, (inner, hidden)),
                ("down of an expert", expert.down, (hidden, inner)),
            ):
                _check_linear(name, linear, shape)
                if linear.bias is not None:
                    raise ValueError(f"{name} has a bias")
        _check_common_layout([linear for expert in experts for linear in (expert.gate, expert.up)])
        _check_common_layout([expert.down for expert in experts])
        _check_common_rotation("gate", [linear for expert in experts for linear in (expert.gate, expert.up)])
        _check_common_rotation("down", [expert.down for expert in experts])


@dataclass(frozen=True)
class SequenceSpan:
    """Consecutive new tokens of a sequence, like `edgerazor_sequence_span` of `cpp/decoder.h`.

    Attributes:
        prefix_slot: first KV slot of the prefix, which belongs to another sequence.
        prefix_length: tokens of the prefix; 0: there is none.
        slot: first KV slot of the sequence itself.
        past_length: tokens of the sequence, without the prefix, that are already in the KV cache.
        count: new tokens.
        state_in: the state slot that holds the state after the tokens before, where the network keeps one; -1: there
            are none.
        state_out: the state slot that the state after the new tokens is written to; it may be `state_in`.
    """

    prefix_slot: int
    prefix_length: int
    slot: int
    past_length: int
    count: int
    state_in: int = NO_STATE
    state_out: int = 0

    @property
    def fields(self) -> tuple[int, int, int, int, int]:
        """Where its tokens are, in order."""
        return self.prefix_slot, self.prefix_length, self.slot, self.past_length, self.count

    @property
    def end_position(self) -> int:
        """The position after that of its last token."""
        return self.prefix_length + self.past_length + self.count

    @property
    def new_slots(self) -> tuple[int, int]:
        """The first KV slot that its tokens fill, and the one after the last."""
        first = self.slot + self.past_length
        return first, first + self.count


class PageTable:
    """The pages of the KV cache that hold a sequence: token i has slot `i % PAGE_SLOTS` of its page `i // PAGE_SLOTS`.

    Several tables may have a page in common; only one sequence at most may write to it.
    """

    def __init__(self) -> None:
        self._numbers = np.zeros(8, dtype=np.int32)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> int:
        return int(self.numbers[index])

    @property
    def numbers(self) -> NDArray[np.int32]:
        """The numbers of the pages, int32 [pages]; a view."""
        return self._numbers[: self._count]

    def append(self, page: int) -> None:
        """Add a page behind the others.

        Raises:
            ValueError: there is no such page.
        """
        if not 0 <= page <= LARGEST // PAGE_SLOTS:
            raise ValueError(f"there is no page {page}")
        if self._count == len(self._numbers):
            self._numbers = np.concatenate([self._numbers, np.zeros_like(self._numbers)])
        self._numbers[self._count] = page
        self._count += 1

    def replace(self, index: int, page: int) -> None:
        """Put a page, which holds the same tokens, in the place of another."""
        self._numbers[: self._count][index] = page

    def clear(self) -> None:
        """Remove all pages."""
        self._count = 0


@dataclass(frozen=True)
class PagedSpan:
    """Consecutive new tokens of a sequence whose KV slots are those of a page table.

    Attributes:
        pages: of `past_length + count` tokens at least.
        past_length: tokens of the sequence that are already in the KV cache.
        count: new tokens.
    """

    pages: PageTable
    past_length: int
    count: int


def align_slot(slot: int) -> int:
    """The next KV slot, from this one on, at which a sequence may begin."""
    return -(-slot // SLOT_ALIGNMENT) * SLOT_ALIGNMENT


def _check_sizes(sizes: Sequence[int]) -> None:
    if not all(isinstance(size, int) and 1 <= size <= LARGEST for size in sizes):
        raise ValueError(f"impossible sizes: {tuple(sizes)}")


def _check_linear(name: str, linear: Linear | None, shape: tuple[int, int]) -> None:
    if linear is None:
        raise ValueError(f"{name} is missing")
    matrix = linear.matrix
    if (matrix.out, matrix.columns) != shape:
        raise ValueError(f"{name} must be {list(shape)}, not {[matrix.out, matrix.columns]}")
    if linear.scale is not None and not 0 < linear.scale < float("inf"):
        raise ValueError(f"{name} has the scale {linear.scale}")
    if linear.rotation is not None and linear.rotation.columns != matrix.columns:
        raise ValueError(f"{name} has {matrix.columns} columns, but its rotation {linear.rotation.columns}")
    for part in matrix.parts:
        part.check(linear.row_layout, matrix.out)
    _check_vector(f"bias of {name}", linear.bias, shape[0])


def _check_convolution(convolution: Convolution, features: int) -> None:
    weight = convolution.weight
    sized = weight.dim() == 2 and 1 <= weight.shape[0] <= MOST_TAPS and weight.shape[1] == features
    if not sized or weight.dtype != torch.float32 or not weight.is_contiguous():
        raise ValueError(f"a convolution must be contiguous float32 [kernel, {features}], not {list(weight.shape)}")
    _check_vector("bias of a convolution", convolution.bias, features)


def _check_common_rotation(name: str, linears: Sequence[Linear | None]) -> None:
    """ValueError unless layers that share an input rotate it alike."""
    rotation, *others = [linear.rotation for linear in linears if linear is not None]
    if not all(rotation.equals(other) if rotation and other else rotation is other for other in others):
        raise ValueError(f"{name} and the layers that share its input do not have the same rotation")


def _check_common_layout(linears: Sequence[Linear]) -> None:
    """ValueError unless layers of experts have their groups of weights and of activations alike."""
    if len({(one.matrix.group_size, one.scale is None, one.activation_group) for one in linears}) > 1:
        raise ValueError("the experts of a layer do not have the same groups")


def _check_norm(name: str, norm: Norm | None, features: int) -> None:
    if norm is None:
        return
    if norm.kind not in (RMS, LAYER) or not norm.epsilon >= 0 or (norm.kind == RMS and norm.bias is not None):
        raise ValueError(f"{name} is no norm that we know")
    _check_vector(f"weight of {name}", norm.weight, features)
    _check_vector(f"bias of {name}", norm.bias, features)


def _check_vector(name: str, tensor: Tensor | None, size: int) -> None:
    if tensor is None:
        return
    if tensor.dtype != torch.float32 or tuple(tensor.shape) != (size,) or not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous float32 [{size}], got {tensor.dtype} {list(tensor.shape)}")


# The structures of decoder.h ----------------------------------------------------------------------------------------


class _Matrix(Structure):
    _fields_ = (
        ("layout", c_void_p),
        ("parts", POINTER(native.FormatRowsStructure)),
        ("part_count", c_int32),
        ("rows", c_int32),
        ("bias", c_void_p),
        ("scale", c_float),
        ("block", c_int32),
        ("signs", c_void_p),
    )


class _Norm(Structure):
    _fields_ = (("kind", c_int32), ("epsilon", c_float), ("weight", c_void_p), ("bias", c_void_p))


class _Convolution(Structure):
    _fields_ = (("kernel", c_int32), ("weight", c_void_p), ("bias", c_void_p))


_DELTA_SIZES = ("key_heads", "value_heads", "key_dim", "value_dim")


class _DeltaRule(Structure):
    _fields_ = (
        *((name, c_int32) for name in _DELTA_SIZES),
        ("decay", c_void_p),
        ("decay_bias", c_void_p),
        ("state_norm", _Norm),
    )


_MAMBA_SIZES, _MAMBA_BOUNDS = ("groups", "heads", "head_dim", "state_size"), ("least_step", "most_step")
_MAMBA_VECTORS = ("decay", "step_bias", "skip")


class _Mamba2(Structure):
    _fields_ = (
        *((name, c_int32) for name in _MAMBA_SIZES),
        *((name, c_float) for name in _MAMBA_BOUNDS),
        *((name, c_void_p) for name in _MAMBA_VECTORS),
        ("norm", _Norm),
    )


class _Expert(Structure):
    _fields_ = (("gate", _Matrix), ("up", _Matrix), ("down", _Matrix))


_EXPERT_NORMS = ("router_norm", "before", "after", "after_mlp_alone")


class _Experts(Structure):
    _fields_ = (
        *((name, c_int32) for name in ("count", "chosen", "sigmoid", "normalized")),
        *((name, c_float) for name in ("epsilon", "scale")),
        ("router", c_void_p),
        ("choice_bias", c_void_p),
        ("factors", c_void_p),
        *((name, _Norm) for name in _EXPERT_NORMS),
        ("experts", POINTER(_Expert)),
    )


#: Mixers, by the number that the library knows them by.
_MIXERS = (type(None), ShortConvolution, GatedDeltaRule, Mamba2)
_LINEARS = ("o", "gate", "up", "down", "input_gate", "input_o")
_NORMS = (
    *("before_attention", "after_attention", "before_mlp", "after_mlp", "after_input"),
    *("q_norm", "k_norm", "v_norm"),
)
_HEADS = ("num_heads", "num_kv_heads", "head_dim", "kv_source")
_LAYER_SETTINGS = ("rope_dim", "rope_table", "sliding_window", "gated_queries")


class _Layer(Structure):
    _fields_ = (
        ("mixer", c_int32),
        ("inputs", _Matrix * 4),
        *((name, _Matrix) for name in _LINEARS),
        *((name, _Norm) for name in _NORMS),
        *((name, c_int32) for name in (*_HEADS, *_LAYER_SETTINGS)),
        ("activation", c_int32),
        ("output_scale", c_float),
        ("convolution", _Convolution),
        ("delta_rule", _DeltaRule),
        ("mamba2", _Mamba2),
        ("experts", _Experts),
    )


_INPUT_SCALES = ("table_scale", "projection_scale", "scale")


class _LayerInputs(Structure):
    _fields_ = (
        ("features", c_int32),
        ("table", _Matrix),
        ("projection", c_void_p),
        ("half", c_int32),
        ("norm", _Norm),
        *((name, c_float) for name in _INPUT_SCALES),
    )


_SIZES = ("hidden_size", "vocab_size")
_SETTINGS = ("norm_all_heads", "norm_after_rope", "activation_bits", "kv_bits")
_SCALES = (
    *("attention_scale", "embedding_scale", "logit_scale", "residual_scale"),
    *("attention_soft_cap", "logit_soft_cap"),
)


class _Network(Structure):
    _fields_ = (
        *((name, c_int32) for name in (*_SIZES, *_SETTINGS)),
        *((name, c_float) for name in _SCALES),
        ("rope_dim", c_int32),
        ("rope_tables", c_int32),
        ("embedding", _Matrix),
        ("head", _Matrix),
        ("final_norm", _Norm),
        ("layer_inputs", _LayerInputs),
        ("layers", POINTER(_Layer)),
        ("layer_count", c_int32),
    )


class _SequenceSpan(Structure):
    _fields_ = (
        *((name, c_int64) for name in ("prefix_slot", "prefix_length", "slot", "past_length", "count")),
        ("pages", c_void_p),
        ("state_in", c_int64),
        ("state_out", c_int64),
    )


#: Decoder, spans and their number, tokens, output positions.
_TOKENS = [c_void_p, POINTER(_SequenceSpan), c_int64, c_void_p, c_void_p]
_SIGNATURES = {
    "edgerazor_decoder_new": (c_void_p, [POINTER(_Network), c_int, c_int]),
    "edgerazor_decoder_free": (None, [c_void_p]),
    "edgerazor_decoder_set_rope": (None, [c_void_p] * 4),
    "edgerazor_decoder_set_features": (None, [c_void_p, c_void_p, c_int64, c_void_p, c_int32]),
    "edgerazor_decoder_reserve_kv": (c_int, [c_void_p, c_int64]),
    "edgerazor_decoder_kv_bytes": (c_int64, [c_void_p]),
    "edgerazor_decoder_copy_page": (None, [c_void_p, c_int32, c_int32]),
    "edgerazor_decoder_reserve_states": (c_int, [c_void_p, c_int64]),
    "edgerazor_decoder_state_bytes": (c_int64, [c_void_p]),
    "edgerazor_decoder_copy_state": (None, [c_void_p, c_int64, c_int64]),
    "edgerazor_decoder_step": (c_int, [*_TOKENS, c_int64, *[c_void_p] * 4]),
    "edgerazor_decoder_logits": (c_int, [*_TOKENS, c_int64, c_void_p]),
    "edgerazor_decoder_scores": (c_int, [*_TOKENS, c_void_p, c_int64, c_void_p, c_void_p]),
    "edgerazor_decoder_greedy": (
        c_int,
        [*_TOKENS, c_int64, c_int64, c_void_p, c_void_p, POINTER(c_int64)],
    ),
    "edgerazor_decoder_layer": (c_int, [c_void_p, c_int32, POINTER(_SequenceSpan), c_int64, c_void_p]),
}


@cache
def _loaded() -> ctypes.CDLL:
    library = native.loaded()
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


class _Structures:
    """The structures of a network. What they point to lives as long as this object and the network.

    Attributes:
        tensors: signs of rotations and rows of routers, to which the library keeps pointers, as to weights.
    """

    def __init__(self, network: Network) -> None:
        self._arrays: list[ctypes.Array] = []
        self.tensors: list[Tensor] = []
        layers = [self._layer(network, number, layer) for number, layer in enumerate(network.layers)]
        inputs = network.layer_inputs
        self.network = _Network(
            *(getattr(network, name) for name in (*_SIZES, *_SETTINGS, *_SCALES)),
            network.rope_dim,
            network.rope_tables,
            self._matrix(network.embedding),
            self._matrix(network.head),
            self._norm(network.final_norm),
            _LayerInputs() if inputs is None else self._layer_inputs(inputs),
            (_Layer * len(layers))(*layers),
            len(layers),
        )

    def _layer_inputs(self, inputs: LayerInputs) -> _LayerInputs:
        projection = rows_by_sixteen(inputs.projection)
        self.tensors.append(projection)
        return _LayerInputs(
            inputs.features,
            self._matrix(inputs.table),
            _pointer(projection),
            inputs.projection.dtype == torch.bfloat16,
            self._norm(inputs.norm),
            *(getattr(inputs, name) for name in _INPUT_SCALES),
        )

    def _layer(self, network: Network, number: int, layer: Layer) -> _Layer:
        mixer = layer.mixer
        convolution = _Convolution() if mixer is None else self._convolution(mixer.convolution)
        return _Layer(
            _MIXERS.index(type(mixer)),
            (_Matrix * 4)(*map(self._matrix, layer.inputs)),
            *(self._matrix(getattr(layer, name)) for name in _LINEARS),
            *(self._norm(getattr(layer, name)) for name in _NORMS),
            network.num_heads,
            *network.kv_heads_of(layer),
            number if layer.kv_source is None else layer.kv_source,
            *(getattr(layer, name) for name in _LAYER_SETTINGS),
            ACTIVATIONS.index(layer.activation),
            layer.output_scale,
            convolution,
            self._delta_rule(mixer) if isinstance(mixer, GatedDeltaRule) else _DeltaRule(),
            self._mamba2(mixer) if isinstance(mixer, Mamba2) else _Mamba2(),
            _Experts() if layer.experts is None else self._experts(layer.experts),
        )

    @staticmethod
    def _convolution(convolution: Convolution) -> _Convolution:
        return _Convolution(len(convolution.weight), _pointer(convolution.weight), _pointer(convolution.bias))

    def _delta_rule(self, rule: GatedDeltaRule) -> _DeltaRule:
        sizes = (getattr(rule, name) for name in _DELTA_SIZES)
        return _DeltaRule(*sizes, _pointer(rule.decay), _pointer(rule.decay_bias), self._norm(rule.state_norm))

    def _mamba2(self, mixer: Mamba2) -> _Mamba2:
        numbers = (getattr(mixer, name) for name in (*_MAMBA_SIZES, *_MAMBA_BOUNDS))
        return _Mamba2(*numbers, *(_pointer(getattr(mixer, name)) for name in _MAMBA_VECTORS), self._norm(mixer.norm))

    def _experts(self, mixture: Experts) -> _Experts:
        experts = [_Expert(*map(self._matrix, expert.linears)) for expert in mixture.experts]
        array = (_Expert * len(experts))(*experts)
        self._arrays.append(array)
        self.tensors.append(rows_by_sixteen(mixture.router))
        return _Experts(
            len(experts),
            mixture.chosen,
            mixture.sigmoid,
            mixture.normalized,
            mixture.epsilon,
            mixture.scale,
            _pointer(self.tensors[-1]),
            _pointer(mixture.choice_bias),
            _pointer(mixture.factors),
            *(self._norm(getattr(mixture, name)) for name in _EXPERT_NORMS),
            array,
        )

    def _matrix(self, linear: Linear | None) -> _Matrix:
        if linear is None:
            return _Matrix()
        matrix = linear.matrix
        parts = (native.FormatRowsStructure * len(matrix.parts))(*(part.structure() for part in matrix.parts))
        self._arrays.append(parts)
        scale = 0.0 if linear.scale is None else max(linear.scale, SMALLEST)
        values = (linear.row_layout.handle, parts, len(parts), matrix.out, _pointer(linear.bias), scale)
        if linear.rotation is None:
            return _Matrix(*values, 0, None)
        self.tensors.append(linear.rotation.sign_bits)
        return _Matrix(*values, linear.rotation.block, _pointer(self.tensors[-1]))

    @staticmethod
    def _norm(norm: Norm | None) -> _Norm:
        if norm is None:
            return _Norm(NO_NORM, 0.0, None, None)
        return _Norm(norm.kind, norm.epsilon, _pointer(norm.weight), _pointer(norm.bias))


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


# The decoder --------------------------------------------------------------------------------------------------------


class Decoder:
    """A network with a KV cache and a thread pool of its own. Calls from several threads wait for one another.

    Threads do not survive a fork: a child process that has a copy of a decoder cannot call it (`OtherProcessError`),
    and does not free its memory.

    Args:
        network: what to compute.
        threads: at least 1, the caller's own among them.
        isa: number of an instruction set of `native.isas`; -1 for the best one.

    Attributes:
        slots: KV slots that are reserved.
        states: state slots that are reserved.

    Raises:
        ValueError: the network does not fit together.
        MemoryError: there is not enough memory, or the system has no more threads.
    """

    def __init__(self, network: Network, threads: int = 1, isa: int = -1) -> None:
        network.check()
        if not 1 <= threads <= MOST_THREADS:
            raise ValueError(f"there are 1 to {MOST_THREADS} threads, not {threads}")
        self.network = network
        self.slots = self.states = 0
        self.process = os.getpid()
        self._lock = threading.Lock()
        self._has_states = network.has_states
        self._uses_rope = any(layer.rope_dim for layer in network.layers)
        self._cosines = self._sines = torch.empty(0, network.rope_tables * network.rope_dim // 2)
        self._query_scales: Tensor | None = None
        self._features = (torch.empty(0, network.hidden_size), torch.empty(0, 0, network.hidden_size))
        structures = _Structures(network)
        handle = _loaded().edgerazor_decoder_new(ctypes.byref(structures.network), isa % len(native.isas()), threads)
        if not handle:
            raise MemoryError(f"there is not enough memory, or are not enough threads, for a decoder with {threads}")
        self._handle = c_void_p(handle)
        # The finalizer holds what the library points to until the library has freed the decoder.
        weakref.finalize(self, _free, self._handle, (network, structures.tensors), self.process)

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Keeps other threads from calling the library meanwhile.

        Raises:
            OtherProcessError: this is not the process that created the decoder.
        """
        if os.getpid() != self.process:  # checked before the lock, which a thread of the other process may hold forever
            raise OtherProcessError("a decoder belongs to the process that made it")
        with self._lock:
            yield

    def set_rope(self, cosines: Tensor, sines: Tensor, query_scales: Tensor | None = None) -> None:
        """Sets the RoPE tables of the next calls.

        Args:
            cosines: contiguous float32 [positions, rope_tables * rope_dim / 2], one table beside the other.
            sines: likewise.
            query_scales: factors of queries, contiguous float32 [positions]; None: there are none.

        Raises:
            ValueError: a table has another shape or dtype, or is not contiguous.
        """
        shape = (len(cosines), self.network.rope_tables * self.network.rope_dim // 2)
        for table in (cosines, sines):
            if table.dtype != torch.float32 or tuple(table.shape) != shape or not table.is_contiguous():
                raise ValueError(f"tables of the rotary embedding must be contiguous float32 {list(shape)}")
        _check_vector("factors of queries", query_scales, len(cosines))
        with self._exclusive():
            self._cosines, self._sines, self._query_scales = cosines, sines, query_scales
            pointers = (cosines.data_ptr(), sines.data_ptr(), _pointer(query_scales))
            _loaded().edgerazor_decoder_set_rope(self._handle, *pointers)

    def set_features(self, rows: Tensor, deep: Tensor | None = None) -> None:
        """Sets what tokens behind the vocabulary are in the next calls: features of pictures.

        Args:
            rows: float32 [count, hidden_size], of the tokens vocab_size to vocab_size + count - 1.
            deep: float32 [levels, count, hidden_size], what is added for them to the outputs of the first layers.

        Raises:
            ValueError: a tensor has another shape.
        """
        count, width = len(rows), self.network.hidden_size
        deep = torch.empty(0, count, width) if deep is None else deep
        if tuple(rows.shape) != (count, width) or tuple(deep.shape) != (len(deep), count, width):
            raise ValueError(f"features of pictures must be [{count}, {width}], and as many for each level")
        if len(deep) > len(self.network.layers):
            raise ValueError(f"there are no {len(deep)} layers to add features to")
        features = rows.float().contiguous(), deep.float().contiguous()
        with self._exclusive():
            self._features = features
            pointers = features[0].data_ptr(), count, features[1].data_ptr(), len(deep)
            _loaded().edgerazor_decoder_set_features(self._handle, *pointers)

    def reserve(self, slots: int) -> None:
        """Reserves memory for at least so many KV slots; what is in the KV cache stays.

        Raises:
            ValueError: the number is out of range.
            MemoryError: there is not enough memory.
        """
        if not isinstance(slots, int) or not 0 <= slots <= LARGEST:
            raise ValueError(f"a KV cache has 0 to {LARGEST} slots, not {slots}")
        if slots > self.slots:
            if slots * self.network.kv_slot_bytes() > physical_memory():
                raise MemoryError(f"there is not enough memory for a cache of {slots} tokens")
            with self._exclusive():
                _check_status(_loaded().edgerazor_decoder_reserve_kv(self._handle, align_slot(slots)))
            self.slots = align_slot(slots)

    def reserve_states(self, count: int) -> None:
        """Reserves memory for at least so many state slots; what is in them stays.

        Raises:
            ValueError: the number is out of range.
            MemoryError: there is not enough memory.
        """
        if not isinstance(count, int) or not 0 <= count <= LARGEST:
            raise ValueError(f"there are 0 to {LARGEST} state slots, not {count}")
        if count > self.states:
            if count * self.state_bytes() > physical_memory():
                raise MemoryError(f"there is not enough memory for {count} states")
            with self._exclusive():
                _check_status(_loaded().edgerazor_decoder_reserve_states(self._handle, count))
            self.states = count

    def state_bytes(self) -> int:
        """Bytes of a state slot; 0 where no layer keeps a state."""
        size: int = _loaded().edgerazor_decoder_state_bytes(self._handle)
        return size

    def copy_state(self, source: int, target: int) -> None:
        """Copies a state to another state slot.

        Raises:
            ValueError: there is no such slot.
        """
        for slot in (source, target):
            if not 0 <= slot < self.states:
                raise ValueError(f"there is no state slot {slot}")
        with self._exclusive():
            _loaded().edgerazor_decoder_copy_state(self._handle, source, target)

    def kv_cache_bytes(self) -> int:
        """Memory of the KV cache, in bytes."""
        size: int = _loaded().edgerazor_decoder_kv_bytes(self._handle)
        return size

    def logits(
        self,
        spans: Sequence[SequenceSpan],
        tokens: Sequence[int] | Tensor,
        output_positions: Sequence[int] | Tensor,
    ) -> Tensor:
        """Logits float32 [output positions, vocab_size].

        Args:
            spans: new tokens of sequences. Their KV slots must be reserved, and those that they attend to filled.
            tokens: of all spans, one span after the other.
            output_positions: indices of the tokens after which to compute logits. There may be none: then the tokens
                only enter the KV cache.

        Raises:
            ValueError: an argument is out of range.
            NotFiniteError: a number became infinite or NaN.
        """
        ids, positions = self._arguments(spans, tokens, output_positions)
        logits = torch.empty(len(positions), self.network.vocab_size)
        self._call("logits", spans, ids.data_ptr(), positions.data_ptr(), len(positions), logits.data_ptr())
        return logits

    def scores(
        self,
        spans: Sequence[SequenceSpan],
        tokens: Sequence[int],
        output_positions: Sequence[int],
        targets: Sequence[int],
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities float32 of targets, and the most probable tokens int32; both [output positions].

        Args:
            spans: as for `logits`.
            tokens: as for `logits`.
            output_positions: as for `logits`.
            targets: for each of the output positions, a token that may follow.

        Raises:
            ValueError: as for `logits`.
            NotFiniteError: as for `logits`.
        """
        ids, positions = self._arguments(spans, tokens, output_positions)
        target_ids = _int32(targets)
        if len(target_ids) != len(positions):
            raise ValueError(f"there are {len(target_ids)} targets of {len(positions)} tokens")
        _check_range("targets", target_ids, self.network.vocab_size)
        log_probabilities, best = torch.empty(len(positions)), torch.empty(len(positions), dtype=torch.int32)
        inputs = (ids.data_ptr(), positions.data_ptr(), target_ids.data_ptr(), len(positions))
        self._call("scores", spans, *inputs, log_probabilities.data_ptr(), best.data_ptr())
        return log_probabilities, best

    def step(
        self,
        spans: Sequence[PagedSpan],
        tokens: Sequence[int],
        output_positions: Sequence[int],
        totals: Sequence[bool],
        logits: NDArray[np.float32],
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """A step of a batch: new tokens of sequences with page tables.

        No result depends on what else is in the call, to the bit where activations are quantized.

        Args:
            spans: new tokens of sequences. Their pages must be reserved, the slots that they attend to filled, and no
                page written to by one span and used by another one.
            tokens: of all spans, one span after the other.
            output_positions: ascending indices of the tokens after which to compute logits; there may be none.
            totals: for each of the output positions, whether the logarithm of the sum of exponentials is wanted.
            logits: float32 [at least as many as output positions, vocab_size], contiguous: the first rows are
                overwritten by the logits.

        Returns:
            The most probable tokens int32 (the first of equal ones; -1 where its logit is not finite), and the
            logarithms of the sums of exponentials of the logits, float32 (0 where they are not wanted); both [output
            positions]. A logit less this logarithm is a log-probability.

        Raises:
            ValueError: an argument is out of range.
            NotFiniteError: a number became infinite or NaN. Another call with the same spans, or some of them, is then
                the same as if this one had not been.
        """
        structures = self._paged_structures(spans)
        ids, positions = np.array(tokens, dtype=np.int64), np.array(output_positions, dtype=np.int64)
        if len(ids) != sum(span.count for span in spans):
            raise ValueError(f"there are {len(ids)} tokens in spans of {sum(span.count for span in spans)}")
        if not 0 <= int(ids.min()) <= int(ids.max()) < self.network.vocab_size:
            raise ValueError(f"tokens must be between 0 and {self.network.vocab_size - 1}")
        count = len(positions)
        if count and not (positions[0] >= 0 and positions[-1] < len(ids) and (np.diff(positions) > 0).all()):
            raise ValueError(f"output positions must ascend, between 0 and {len(ids) - 1}")
        rows = logits.shape == (len(logits), self.network.vocab_size) and logits.flags.c_contiguous
        if not rows or logits.dtype != np.float32 or len(logits) < count or len(totals) != count:
            raise ValueError(f"{count} outputs need a contiguous float32 [{count}, vocabulary], and a flag each")
        wanted, ids = np.array(totals, dtype=np.uint8), ids.astype(np.int32)
        best, log_totals = np.empty(count, dtype=np.int32), np.zeros(count, dtype=np.float32)
        arrays = (positions, wanted, logits, best, log_totals)
        first, *others = (array.ctypes.data for array in arrays)
        with self._exclusive():
            status = _loaded().edgerazor_decoder_step(
                self._handle, structures, len(spans), ids.ctypes.data, first, count, *others
            )
        _check_status(status)
        return best, log_totals

    def copy_page(self, source: int, target: int) -> None:
        """Copies the keys and values in a page of a page table to another page.

        Raises:
            ValueError: there is no such page.
        """
        for page in (source, target):
            if not 0 <= page < self.slots // PAGE_SLOTS:
                raise ValueError(f"there is no page {page}")
        with self._exclusive():
            _loaded().edgerazor_decoder_copy_page(self._handle, source, target)

    def _paged_structures(self, spans: Sequence[PagedSpan]) -> ctypes.Array[_SequenceSpan]:
        """The structures of spans, checked."""
        if not spans:
            raise ValueError("there are no spans")
        if self._has_states:
            raise ValueError("a network that keeps states has no page tables")
        pages, positions = self.slots // PAGE_SLOTS, len(self._cosines)
        written: list[int] = []
        structures = (_SequenceSpan * len(spans))()
        for structure, span in zip(structures, spans, strict=True):
            table, past, count = span.pages, span.past_length, span.count
            if count < 1 or past < 0 or past + count > len(table) * PAGE_SLOTS:
                raise ValueError(f"impossible span: {count} tokens after {past} in {len(table)} pages")
            numbers = table.numbers
            if numbers.max() >= pages:
                raise ValueError(f"{pages} pages are reserved, too few for {numbers.tolist()}")
            if past + count > positions and self._uses_rope:
                raise ValueError(f"the rotary embedding has {positions} positions, too few for {past + count}")
            written += numbers[past // PAGE_SLOTS : (past + count - 1) // PAGE_SLOTS + 1].tolist()
            structure.past_length, structure.count, structure.pages = past, count, numbers.ctypes.data
        if len(set(written)) < len(written):
            raise ValueError("two spans write to the same page")
        return structures

    def greedy(self, span: SequenceSpan | PagedSpan, token: int, count: int, stops: Sequence[int] = ()) -> list[int]:
        """Greedy decoding: the most probable tokens after `token`, which is the one new token of `span`.

        Args:
            span: of one token.
            token: its token.
            count: the largest number of tokens, at least 1; `span.past_length + count` KV slots must be reserved, and
                in the page table.
            stops: tokens after which to stop.

        Raises:
            ValueError: as for `logits`.
            NotFiniteError: as for `logits`.
        """
        if isinstance(span, PagedSpan):
            return [step[0] for step in self.greedy_together([span], [token], count, stops)]
        _check_greedy([span], count)
        self._check_spans([dataclasses.replace(span, count=count)])
        return [step[0] for step in self._greedy(_structures([span]), [token], count, stops, None)]

    def greedy_together(
        self,
        spans: Sequence[PagedSpan],
        tokens: Sequence[int],
        count: int,
        stops: Sequence[int] = (),
        interrupt: NDArray[np.int32] | None = None,
    ) -> list[list[int]]:
        """Greedy decoding of several sequences, step by step: the most probable tokens of all of them [steps, spans].

        Args:
            spans: of one token each; as for `step`.
            tokens: the token of each span.
            count: the largest number of steps, at least 1; for each span `past_length + count` slots must be reserved,
                and in the page table.
            stops: the step in which one of them is written is the last.
            interrupt: int32 [1]; the step during which another thread makes it other than 0 is the last.

        Raises:
            ValueError: as for `step`.
            NotFiniteError: as for `step`; slots of several steps may have been written to.
        """
        _check_greedy(spans, count)
        structures = self._paged_structures([dataclasses.replace(span, count=count) for span in spans])
        for structure in structures:
            structure.count = 1
        return self._greedy(structures, tokens, count, stops, interrupt)

    def _greedy(
        self,
        structures: ctypes.Array[_SequenceSpan],
        tokens: Sequence[int],
        count: int,
        stops: Sequence[int],
        interrupt: NDArray[np.int32] | None,
    ) -> list[list[int]]:
        ids = _int32(tokens)
        if len(ids) != len(structures):
            raise ValueError(f"there are {len(ids)} tokens for {len(structures)} spans")
        _check_range("tokens", ids, self.network.vocab_size)
        stop_ids = _int32([stop for stop in stops if 0 <= stop < self.network.vocab_size])
        out, written = np.empty((count, len(structures)), dtype=np.int32), c_int64()
        with self._exclusive():
            status = _loaded().edgerazor_decoder_greedy(
                self._handle,
                structures,
                len(structures),
                ids.data_ptr(),
                stop_ids.data_ptr(),
                len(stop_ids),
                count,
                None if interrupt is None else interrupt.ctypes.data,
                out.ctypes.data,
                ctypes.byref(written),
            )
        _check_status(status)
        steps: list[list[int]] = out[: written.value].tolist()
        return steps

    def layer(self, index: int, spans: Sequence[SequenceSpan], hidden_states: Tensor) -> Tensor:
        """The output of one layer for hidden_states float32 [tokens, hidden_size]; fills its part of the KV cache.

        Raises:
            ValueError: as for `logits`, or layers have inputs beside hidden states.
            NotFiniteError: as for `logits`.
        """
        if not 0 <= index < len(self.network.layers) or self.network.layer_inputs is not None:
            raise ValueError(f"there is no layer {index} that hidden states alone go into")
        self._check_spans(spans)
        shape = (sum(span.count for span in spans), self.network.hidden_size)
        if tuple(hidden_states.shape) != shape:
            raise ValueError(f"hidden states must be {list(shape)}, not {list(hidden_states.shape)}")
        states = hidden_states.to(torch.float32, copy=True).contiguous()
        with self._exclusive():
            status = _loaded().edgerazor_decoder_layer(
                self._handle, index, _structures(spans), len(spans), states.data_ptr()
            )
        _check_status(status)
        return states

    def _call(self, name: str, spans: Sequence[SequenceSpan], *arguments: int) -> None:
        function = getattr(_loaded(), f"edgerazor_decoder_{name}")
        with self._exclusive():
            status = function(self._handle, _structures(spans), len(spans), *arguments)
        _check_status(status)

    def _arguments(
        self,
        spans: Sequence[SequenceSpan],
        tokens: Sequence[int] | Tensor,
        output_positions: Sequence[int] | Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Tokens int32 and output positions int64, checked."""
        self._check_spans(spans)
        ids = _int32(tokens)
        if len(ids) != sum(span.count for span in spans):
            raise ValueError(f"there are {len(ids)} tokens in spans of {sum(span.count for span in spans)}")
        _check_range("tokens", ids, self.network.vocab_size + len(self._features[0]))
        positions = torch.as_tensor(output_positions, dtype=torch.int64).contiguous()
        _check_range("output positions", positions, len(ids))
        return ids, positions

    def _check_spans(self, spans: Sequence[SequenceSpan]) -> None:
        if not spans:
            raise ValueError("there are no spans")
        for span in spans:
            misaligned = span.slot % SLOT_ALIGNMENT or span.prefix_slot % SLOT_ALIGNMENT
            if span.count < 1 or min(span.fields) < 0 or misaligned:
                raise ValueError(f"impossible span: {span}")
            if max(span.prefix_slot + span.prefix_length, span.new_slots[1]) > self.slots:
                raise ValueError(f"{self.slots} KV slots are reserved, too few for {span}")
            if self._uses_rope and span.end_position > len(self._cosines):
                raise ValueError(f"the rotary embedding has {len(self._cosines)} positions, too few for {span}")
            in_range = NO_STATE <= span.state_in < self.states and 0 <= span.state_out < self.states
            if self._has_states and not in_range:
                raise ValueError(f"{self.states} state slots are reserved, too few for {span}")
        filled = sorted(span.new_slots for span in spans)
        if any(before[1] > after[0] for before, after in pairwise(filled)):
            raise ValueError("two spans write to the same KV slot")


def _free(handle: c_void_p, owners: tuple[Network, list[Tensor]], process: int) -> None:
    if os.getpid() == process:  # a child process does not have the threads, and would wait for them forever
        _loaded().edgerazor_decoder_free(handle)


def _structures(spans: Sequence[SequenceSpan]) -> ctypes.Array[_SequenceSpan]:
    return (_SequenceSpan * len(spans))(
        *(_SequenceSpan(*span.fields, None, span.state_in, span.state_out) for span in spans)
    )


def _check_greedy(spans: Sequence[SequenceSpan | PagedSpan], count: int) -> None:
    for span in spans:
        if span.count != 1 or count < 1:
            raise ValueError(
                f"greedy decoding begins with 1 token, not {span.count}, and writes 1 or more, not {count}"
            )


def _int32(numbers: Sequence[int] | Tensor) -> Tensor:
    tensor = torch.as_tensor(numbers, dtype=torch.int64)
    if tensor.dim() != 1:
        raise ValueError(f"tokens must be in a row, not {list(tensor.shape)}")
    _check_range("tokens", tensor, LARGEST)
    return tensor.to(torch.int32).contiguous()


def _check_range(name: str, numbers: Tensor, end: int) -> None:
    if len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < end:
        raise ValueError(f"{name} must be between 0 and {end - 1}")


def _check_status(status: int) -> None:
    """Raises the error that a status of the library stands for."""
    if status == _NO_MEMORY:
        raise MemoryError("there is not enough memory for the cache and activations")
    if status == _NOT_FINITE:
        raise NotFiniteError("a number is not finite")
    assert status == _OK
