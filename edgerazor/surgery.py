"""The modules that replace nn.Linear and nn.Embedding, and the functions that put them in.

Training modules hold the float32 master weight and compute with `decode(encode(weight))`, so that what is trained
is what is packed. Packed modules hold a packed matrix and call the kernels. Both quantize their inputs the same way,
and keys and values enter attention through the same rounding, so the two compute the same numbers.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask

from edgerazor import formats, kernels
from edgerazor.errors import UserError
from edgerazor.formats import Encoded, MatrixSpec
from edgerazor.models import Structure, caps_attention, embedding_scale


@dataclass(frozen=True)
class Settings:
    """How a student and its packed model compute.

    Attributes:
        activation_bits: of the inputs of quantized linear layers; 16 leaves them as they are.
        kv_bits: of keys and values, likewise.
        group_size: consecutive activations of a token that share a scale.
    """

    activation_bits: int
    kv_bits: int
    group_size: int


# --- training ----------------------------------------------------------------------------------


class SharedActivations:
    """Quantizes the inputs of linear layers, once for layers that share an input (q, k and v; gate and up)."""

    def __init__(self, bits: int, group_size: int) -> None:
        self.bits, self.group_size = bits, group_size
        self._input: weakref.ref[Tensor] | None = None
        self._state: tuple[bool, int] | None = None
        self._output: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., features] as the packed model sees it, in the dtype that products are computed in; straight-through
        gradient."""
        if x.is_inference():  # has no version to tell a change by
            return self._quantize(x)
        state = (torch.is_grad_enabled(), x._version)
        if self._input is None or self._input() is not x or self._state != state or self._output is None:
            self._output = self._quantize(x)
            self._input, self._state = weakref.ref(x, self.forget), state
        return self._output

    def _quantize(self, x: Tensor) -> Tensor:
        quantized = x if self.bits == 16 else formats.fake_quantize_activations(x, self.bits, self.group_size)
        return quantized.to(product_dtype(x))

    def forget(self, _dead: object = None) -> None:
        """Let go of the last activations; called by itself when their input is gone."""
        self._input = self._output = None


def product_dtype(x: Tensor) -> torch.dtype:
    """What matrix products with x are computed in: autocast's choice where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class TrainingMatrix(nn.Module):
    """A master weight [rows, columns] in float32 and the formats it is trained for."""

    def __init__(self, weight: nn.Parameter, spec: MatrixSpec) -> None:
        super().__init__()
        self.weight = weight
        self.spec = spec
        self.frozen: Tensor | None = None
        self.digest = ""

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """decode(encode(weight)) [rows, columns] without gradient, computed in float32 and given in a dtype."""
        if self.frozen is not None:
            return self.frozen.to(dtype)
        return formats.round_trip(self.weight.detach(), self.spec, dtype)

    def freeze(self) -> None:
        """Encode once for many forward passes, and keep the digest of the codes and scales they use."""
        encoded = formats.encode_matrix(self.weight.detach(), self.spec)
        self.digest = formats.digest(encoded, self.spec)
        self.frozen = formats.decode_matrix(encoded, self.spec)


class _Product(torch.autograd.Function):
    """`x Ŵᵀ + b` with `Ŵ = decode(encode(W))`. Not Ŵ but the master weight is kept for backward, which decodes again.

    A copy of all decoded weights would be as large as the model; encoding twice costs a few percent of a step.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, matrix: TrainingMatrix) -> Tensor:
        ctx.matrix = matrix
        ctx.save_for_backward(x, weight)
        with torch.autocast(x.device.type, enabled=False):
            return functional.linear(x, matrix.decoded(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        to_x, to_weight, to_bias = ctx.needs_input_grad[:3]
        flat = gradient.flatten(0, -2)  # [n, out]
        return (
            gradient @ ctx.matrix.decoded(x.dtype) if to_x else None,
            (flat.T @ x.flatten(0, -2)).to(weight.dtype) if to_weight else None,
            flat.sum(0, dtype=weight.dtype) if to_bias else None,
            None,
        )


class TrainingLinear(TrainingMatrix):
    """y = W x with quantized W and x. Takes the place of nn.Linear."""

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, spec: MatrixSpec, activations: SharedActivations
    ) -> None:
        super().__init__(weight, spec)
        self.bias = bias
        self.activations = activations
        self.out_features, self.in_features = weight.shape

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return _Product.apply(self.activations(x), self.weight, self.bias, self)

    def as_head(self, states: Tensor) -> tuple[Tensor, dict[str, Tensor | None]]:
        """The same product for losses that make it themselves, a chunk of positions at a time.

        Returns:
            the quantized input in the dtype of the products, and `weight`, `bias` and `master` of `losses.Head`.
        """
        x = self.activations(states)
        return x, {"weight": self.decoded(x.dtype), "bias": self.bias, "master": self.weight}


class TrainingEmbedding(TrainingMatrix):
    """Rows of a quantized table. Takes the place of nn.Embedding."""

    def __init__(self, weight: nn.Parameter, spec: MatrixSpec, scale: float | None) -> None:
        super().__init__(weight, spec)
        self.scale = scale
        self.num_embeddings, self.embedding_dim = weight.shape

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] int64 -> [..., columns]; only the rows looked up are quantized."""
        if self.frozen is not None:
            rows = self.frozen[ids]
        else:
            flat = ids.reshape(-1)
            rows = formats.fake_quantize_matrix(functional.embedding(flat, self.weight), self.spec.take(flat))
            rows = rows.view(*ids.shape, -1)
        return rows if self.scale is None else rows * self.scale


def prepare_for_training(
    model: PreTrainedModel, structure: Structure, specs: Mapping[str, MatrixSpec], settings: Settings
) -> None:
    """Put training modules in the place of every matrix, in place.

    Args:
        model: in float32.
        structure: where its matrices are.
        specs: module path -> formats, for each of `structure.sites`.
        settings: bits of activations and of the cache.

    Raises:
        UserError: as `quantize_cache`.
    """
    activations = SharedActivations(settings.activation_bits, settings.group_size)
    embedding = model.get_input_embeddings()
    head = model.get_output_embeddings()
    spec = specs[structure.embedding.name]
    replace(
        model,
        structure.embedding.name,
        TrainingEmbedding(embedding.weight, spec, embedding_scale(embedding)),
    )
    head_spec = specs[structure.head.name] if structure.head else spec
    replace(model, structure.head_path, TrainingLinear(head.weight, head.bias, head_spec, activations))
    for site in structure.linears:
        linear = model.get_submodule(site.name)
        replace(model, site.name, TrainingLinear(linear.weight, linear.bias, specs[site.name], activations))
    quantize_cache(model, settings.kv_bits)


def training_matrices(model: nn.Module) -> dict[str, TrainingMatrix]:
    """Module path -> training module; a head tied to the embedding is left out."""
    found: dict[str, TrainingMatrix] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, TrainingMatrix) and id(module.weight) not in seen:
            seen.add(id(module.weight))
            found[name] = module
    return found


@contextlib.contextmanager
def frozen_codes(model: nn.Module) -> Iterator[dict[str, str]]:
    """Encode every matrix once for all forward passes inside; gives module path -> digest of what they use."""
    matrices = training_matrices(model)
    by_weight = {id(module.weight): module for module in matrices.values()}
    everywhere = [module for module in model.modules() if isinstance(module, TrainingMatrix)]
    try:
        for module in matrices.values():
            module.freeze()
        for module in everywhere:
            module.frozen = by_weight[id(module.weight)].frozen
        yield {name: module.digest for name, module in matrices.items()}
    finally:
        for module in everywhere:
            module.frozen = None
            if isinstance(module, TrainingLinear):
                module.activations.forget()


def quantize_inputs(model: PreTrainedModel, structure: Structure, settings: Settings) -> None:
    """Round what enters a 16-bit model's linear layers and its keys and values, in place; its weights stay.

    So weights that another tool rounded compute as ours do, and can be compared with them.

    Args:
        model: with nn.Linear layers.
        structure: where they are.
        settings: bits of activations and of the cache.

    Raises:
        UserError: as `quantize_cache`.
    """
    activations = SharedActivations(settings.activation_bits, settings.group_size)
    for name in (*(site.name for site in structure.linears), structure.head_path):
        model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: (activations(inputs[0]), *inputs[1:]))
    quantize_cache(model, settings.kv_bits)


# --- packed ------------------------------------------------------------------------------------


class LazyMatrix:
    """A packed matrix that is read and checked at first use; shared by a tied embedding and head.

    Args:
        load: gives the codes, scales and formats, checked.

    Attributes:
        keep_decoded: keep float32 weights after first use: fast in batches, 4 bytes a weight.
    """

    def __init__(self, load: Callable[[], tuple[Encoded, MatrixSpec]]) -> None:
        self._load = load
        self._matrix: tuple[Encoded, MatrixSpec] | None = None
        self._decoded: Tensor | None = None
        self.keep_decoded = False

    def encoded(self, device: torch.device) -> tuple[Encoded, MatrixSpec]:
        """Codes and scales on a device, and the formats."""
        if self._matrix is None:
            self._matrix = self._load()
        codes, scales = self._matrix[0]
        if codes.device != device:
            self._matrix = Encoded(codes.to(device), scales.to(device)), self._matrix[1]
        return self._matrix

    def decoded(self, device: torch.device) -> Tensor:
        """The weights as float32 [rows, columns]."""
        if self._decoded is not None and self._decoded.device == device:
            return self._decoded
        weight = formats.decode_matrix(*self.encoded(device))
        self._decoded = weight if self.keep_decoded else None
        return weight


class PackedMatrix(nn.Module):
    """A module whose weight is packed; the codes are no parameters, so nothing ever casts or trains them."""

    def __init__(self, lazy: LazyMatrix) -> None:
        super().__init__()
        self.lazy = lazy

    @property
    def weight(self) -> Tensor:
        """What code that looks at `module.weight` expects: the decoded weights, on the CPU."""
        return self.lazy.decoded(torch.device("cpu"))


class PackedLinear(PackedMatrix):
    """y = W x through the kernels. Takes the place of nn.Linear."""

    def __init__(
        self,
        lazy: LazyMatrix,
        bias: nn.Parameter | None,
        shape: tuple[int, int],
        activation_bits: int,
        group_size: int,
    ) -> None:
        super().__init__(lazy)
        self.bias = bias
        self.out_features, self.in_features = shape
        self.activation_bits, self.group_size = activation_bits, group_size

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out] in the dtype of x; computed in float32."""
        bias = None if self.bias is None else self.bias.float()
        if self.lazy.keep_decoded:
            weight = self.lazy.decoded(x.device)
            y = kernels.decoded_linear(x, weight, bias, self.activation_bits, self.group_size)
        else:
            y = kernels.linear(x, *self.lazy.encoded(x.device), bias, self.activation_bits, self.group_size)
        return y.to(x.dtype)


class PackedEmbedding(PackedMatrix):
    """Rows of a packed table. Takes the place of nn.Embedding."""

    def __init__(self, lazy: LazyMatrix, scale: float | None, shape: tuple[int, int], dtype: torch.dtype) -> None:
        super().__init__(lazy)
        self.scale = scale
        self.num_embeddings, self.embedding_dim = shape
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)  # follows `model.to(dtype)`

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] int64 -> [..., columns]."""
        rows = kernels.embedding(ids, *self.lazy.encoded(ids.device)).to(self.like.dtype)
        return rows if self.scale is None else rows * self.scale


def install_packed(
    model: PreTrainedModel,
    shapes: Mapping[str, tuple[int, int]],
    tied: Mapping[str, str],
    load: Callable[[str], tuple[Encoded, MatrixSpec]],
    settings: Settings,
    dtype: torch.dtype,
) -> None:
    """Put packed modules in the place of the named matrices, in place.

    Args:
        model: its modules may be on the meta device, their weights are never looked at.
        shapes: module path -> [rows, columns].
        tied: path of a head -> path of the embedding whose matrix it uses.
        load: reads the matrix of a module path.
        settings: bits of activations and of the cache.
        dtype: of the hidden states, which the embedding starts.

    Raises:
        UserError: a named matrix has no place in the model.
    """
    lazy = {name: LazyMatrix(functools.partial(load, name)) for name in shapes}
    for name, source in {**{name: name for name in shapes}, **tied}.items():
        shape = shapes[source]
        module = _place(model, name, shape)
        if isinstance(module, nn.Embedding):
            new: nn.Module = PackedEmbedding(lazy[source], embedding_scale(module), shape, dtype)
        else:
            new = PackedLinear(lazy[source], module.bias, shape, settings.activation_bits, settings.group_size)
        replace(model, name, new)
    quantize_cache(model, settings.kv_bits)


def _place(model: nn.Module, name: str, shape: tuple[int, int]) -> nn.Linear | nn.Embedding:
    """The module that a packed matrix replaces."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        module = None
    if not isinstance(module, nn.Linear | nn.Embedding) or tuple(module.weight.shape) != shape:
        raise UserError(
            f"The packed matrix {name} {list(shape)} has no place in {type(model).__name__}; "
            "config.json and the weights do not belong together.",
            "Pack the model again.",
        )
    return module


def keep_decoded(model: nn.Module, keep: bool = True) -> None:
    """Keep the decoded weights of a packed model in memory from their first use on."""
    for module in model.modules():
        if isinstance(module, PackedMatrix):
            module.lazy.keep_decoded = keep


# --- attention ---------------------------------------------------------------------------------


def quantize_cache(model: PreTrainedModel, bits: int) -> None:
    """Round keys and values to int8 per token and head where they enter attention, after the rotary embedding.

    The rounding of a token does not depend on other tokens, so it is the same with and without a cache.

    Raises:
        UserError: as `check_cache`.
    """
    if bits == 16:
        return
    check_cache(model, bits)
    eager = model.config._attn_implementation == "eager" or caps_attention(model.config)
    base = "eager" if eager else "sdpa"
    name = f"edgerazor_kv{bits}_{base}"
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation"):
            config._attn_implementation = name


def check_cache(model: PreTrainedModel, bits: int) -> None:
    """Make sure that keys and values can be rounded, so that it is never left out quietly.

    Raises:
        UserError: the model's attention is written so that nothing can be put in front of it.
    """
    modeling = sys.modules[type(model).__module__]
    if bits != 16 and not hasattr(modeling, "ALL_ATTENTION_FUNCTIONS"):
        raise UserError(
            f"The keys and values of {type(model).__name__} cannot be rounded to {bits} bits, because transformers has "
            "no exchangeable attention for it.",
            "Keep them in 16 bits: --kv-bits 16.",
        )


def _attention(bits: int, base: str) -> Callable[..., Any]:
    def forward(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        """query, key, value: [batch, heads, tokens, head_dim]."""
        attend = sdpa_attention_forward
        if base == "eager":  # each family has its own, beside its attention class
            attend = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
        key, value = formats.fake_quantize_kv(key, bits), formats.fake_quantize_kv(value, bits)
        return attend(module, query, key, value, *args, **kwargs)

    return forward


for _base, _mask in (("sdpa", sdpa_mask), ("eager", eager_mask)):
    AttentionInterface.register(f"edgerazor_kv8_{_base}", _attention(8, _base))
    AttentionMaskInterface.register(f"edgerazor_kv8_{_base}", _mask)


def replace(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a path."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
