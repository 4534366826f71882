"""Modules for training: they hold the float32 master weight and compute with `decode(encode(weight))`.

What is trained is therefore what is packed. The gradient passes straight through the rounding to the master weight, or
where scales are learned, through `formats.ste_target` to the master weight and the scales.

Where the spec has a rotation, master weights are rotated from the beginning, in checkpoints, too. Then nothing is
rotated at a step but inputs, and rows of the embedding back.

Two things are called frozen in the field and are kept apart here. `freeze_codes` fixes the codes for a phase of the
training, in which only scales, norm gains and biases learn. `encoded_once` is for evaluation: it encodes each matrix
once for many forward passes, and gives the digests of the codes and scales that these passes use. `rounded_once` is for
an optimizer step: weights change only behind it, so each matrix is rounded once for all passes of all micro-batches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from edgerazor import formats
from edgerazor.formats import Encoded, MatrixSpec
from edgerazor.modules.shared_activations import DYNAMIC, InputScales, SharedActivations, TokenMask

#: Identity of a master weight and a dtype -> the rounded weight in it.
Rounded: TypeAlias = dict[tuple[int, torch.dtype], Tensor]
#: Ids int64 [n] and gradients [n, columns] of rows of a table.
RowGradients: TypeAlias = list[tuple[Tensor, Tensor]]


class FrozenMaster(NamedTuple):
    """Saved master weight and scales of a matrix whose codes are frozen; `unfreeze_codes` restores them.

    Attributes:
        weight: the master weight, float32 [rows, columns].
        scales: float16 [rows, groups], with which the master weight encodes to the frozen codes.
    """

    weight: nn.Parameter
    scales: Tensor


class FakeQuantWeight(nn.Module):
    """A master weight [rows, columns] and the formats that it is trained for.

    Attributes:
        weight: the master weight, float32, rotated where the spec has a rotation; or the codes, int8, where codes are
            frozen and only scales are trained.
        scales: float32 [rows, groups], with gradient where they are trained, without where they stay as initialized;
            None where they follow from the weight, as the spec says.
        spec: formats of the rows.
        master: the saved master weight while codes are frozen; None where they are not, or were so from the start.
        decoded_cache: float32 [rows, columns], the weight to compute with inside `encoded_once`; None outside.
        digest: of the codes and scales behind `decoded_cache`.
        rounded: what `decoded` has computed inside `rounded_once`, of all matrices of the model; None outside.
    """

    def __init__(self, weight: nn.Parameter, spec: MatrixSpec, scales: nn.Parameter | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.scales = scales
        self.spec = spec
        self.master: FrozenMaster | None = None
        self.decoded_cache: Tensor | None = None
        self.digest = ""
        self.rounded: Rounded | None = None

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """`decode(encode(weight))` [rows, columns] without gradient, computed in float32 and converted to a dtype."""
        if self.decoded_cache is not None:
            return self.decoded_cache.to(dtype)
        if self.rounded is None:
            return self._decoded(dtype)
        key = id(self.weight), dtype  # a tied head shares its embedding's weight
        if key not in self.rounded:
            self.rounded[key] = self._decoded(dtype)
        return self.rounded[key]

    def _decoded(self, dtype: torch.dtype) -> Tensor:
        if self.scales is not None:
            return formats.learned_weight(self.weight.detach(), self.scales, self.spec, dtype)
        return formats.quantize_dequantize(self.weight.detach(), self.spec, dtype)

    def ste_target(self) -> Tensor:
        """Tensor [rows, columns] that receives the straight-through gradient of the dequantized weight.

        Do not read its value. Where scales are not trained it is the master weight itself.
        """
        if self.scales is None or not self.scales.requires_grad:
            return self.weight
        return formats.ste_target(self.weight, self.scales, self.spec)

    def encoded(self) -> Encoded:
        """The codes and scales that this module computes with."""
        return encode_trained(self.weight.detach(), self.scales, self.spec)

    def encode_once(self, keep: bool = True) -> None:
        """Fill `digest` and, where `keep` says so, `decoded_cache` for the forward passes to come."""
        encoded = self.encoded()
        self.digest = formats.digest(encoded, self.spec)
        self.decoded_cache = formats.decode_matrix(encoded, self.spec) if keep else None


def encode_trained(weight: Tensor, scales: Tensor | None, spec: MatrixSpec) -> Encoded:
    """Codes and scales of a trained matrix.

    Args:
        weight: the master weight, floating [rows, columns], or the codes, int8, where codes were frozen.
        scales: floating [rows, groups] if they were trained or stored; None if they follow from the weight.
        spec: formats of the rows.

    Raises:
        ValueError: as `formats.encode_matrix`, or codes come without scales.
    """
    if weight.dtype != torch.int8:
        return formats.encode_matrix(weight, spec, None if scales is None else formats.stored_scales(scales))
    if scales is None:
        raise ValueError("there are codes without scales")
    return Encoded(weight, formats.stored_scales(scales))


class _FakeQuantMatmul(torch.autograd.Function):
    """`x Ŵᵀ + b` with `Ŵ = decode(encode(W))`. Backward saves the master weight instead of Ŵ, and decodes again.

    Inside `rounded_once` that is one and the same tensor; outside, no copy of the whole model's weights is kept.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, matrix: FakeQuantWeight) -> Tensor:
        ctx.matrix = matrix
        ctx.save_for_backward(x, weight)
        with torch.autocast(x.device.type, enabled=False):
            return functional.linear(x, matrix.decoded(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        flat = gradient.flatten(0, -2)  # [n, out]
        return (
            gradient @ ctx.matrix.decoded(x.dtype) if needs_x else None,
            (flat.T @ x.flatten(0, -2)).to(weight.dtype) if needs_weight else None,
            flat.sum(0, dtype=weight.dtype) if needs_bias else None,
            None,
        )


class FakeQuantLinear(FakeQuantWeight):
    """y = Ŵ x̂ + b with quantized weight and input. Takes the place of nn.Linear.

    Args:
        weight: the master weight, float32 [out, in], or frozen codes, int8.
        bias: float32 [out], or None.
        spec: formats of the rows.
        activations: quantizes the input; shared with the other linear layers of the model.
        scales: see `FakeQuantWeight`.
        input_scales: stored or trained scales of the input.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        spec: MatrixSpec,
        activations: SharedActivations,
        scales: nn.Parameter | None = None,
        input_scales: InputScales = DYNAMIC,
    ) -> None:
        super().__init__(weight, spec, scales)
        self.bias = bias
        self.activations = activations
        # These are attributes one by one, since trained ones are parameters, which checkpoints store under these names.
        self.input_scale, self.low_input_scale = input_scales.scale, input_scales.low_scale
        self.input_zero_point, self.low_input_zero_point = input_scales.zero_point, input_scales.low_zero_point
        self.important: TokenMask | None = None
        self.out_features, self.in_features = weight.shape

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return _FakeQuantMatmul.apply(self.quantized_input(x), self.ste_target(), self.bias, self)

    def quantized_input(self, x: Tensor) -> Tensor:
        """The rotated and quantized input [..., in], which the weight is multiplied with, for x [..., in]."""
        important = None if self.important is None else self.important()
        scales = InputScales(self.input_scale, self.low_input_scale, self.input_zero_point, self.low_input_zero_point)
        return self.activations(x, scales, important, self.spec.rotation)

    def as_head(self, states: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Operands of this layer's product, for losses that compute it themselves, a chunk of positions at a time.

        Args:
            states: floating [..., in].

        Returns:
            the quantized input in the dtype of the products, and `weight`, `bias` and `master` of `losses.Head`.
        """
        scales = InputScales(self.input_scale, zero_point=self.input_zero_point)
        x = self.activations(states, scales, None, self.spec.rotation)
        return x, {"weight": self.decoded(x.dtype), "bias": self.bias, "master": self.ste_target()}


class FakeQuantEmbedding(FakeQuantWeight):
    """Rows of a quantized table. Takes the place of nn.Embedding.

    Args:
        weight: the master weight, float32 [rows, columns], or frozen codes, int8.
        spec: formats of the rows.
        scale: factor of the rows that some families apply inside the embedding module; None: 1.
        scales: see `FakeQuantWeight`.

    Attributes:
        row_gradients: where the ids [n] of the rows that were looked up and the gradients [n, columns] of these go, in
            the place of a gradient of the whole weight; None: there is such a gradient.
    """

    def __init__(
        self, weight: nn.Parameter, spec: MatrixSpec, scale: float | None, scales: nn.Parameter | None = None
    ) -> None:
        super().__init__(weight, spec, scales)
        self.scale = scale
        self.row_gradients: RowGradients | None = None
        self.num_embeddings, self.embedding_dim = weight.shape

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] int64 -> [..., columns]; only the rows that are looked up are quantized."""
        rows = self.spec.rotate_back(self._quantized_rows(ids.reshape(-1))).view(*ids.shape, -1)
        return rows if self.scale is None else rows * self.scale

    def _quantized_rows(self, ids: Tensor) -> Tensor:
        """Quantized rows, float32 [n, columns], of ids [n], with gradients."""
        if self.decoded_cache is not None:
            return self.decoded_cache[ids]
        spec = self.spec.take(ids)
        if self.scales is None:
            return formats.fake_quantize_matrix(self._rows(ids), spec)
        scales = functional.embedding(ids, self.scales)
        are_codes = self.weight.dtype == torch.int8
        weight = self.weight[ids] if are_codes else self._rows(ids)
        ste_target = formats.ste_target(weight, scales, spec) if self.scales.requires_grad else weight
        return formats.straight_through(ste_target, lambda _: formats.learned_weight(weight.detach(), scales, spec))

    def _rows(self, ids: Tensor) -> Tensor:
        if self.row_gradients is None:
            return functional.embedding(ids, self.weight)
        return _LookedUp.apply(self.weight, ids, self.row_gradients)


class _LookedUp(torch.autograd.Function):
    """Rows of a weight, whose gradients go into a list."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, gradients: RowGradients) -> Tensor:
        ctx.gradients = gradients
        ctx.save_for_backward(ids)
        return functional.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        ctx.gradients.append((ctx.saved_tensors[0], gradient))
        return None, None, None


def freeze_codes(model: nn.Module) -> None:
    """Fix the codes of every matrix, in place; from now on only scales, norm gains and biases are trained.

    Args:
        model: with fake-quantized modules whose scales are trained. Codes that are frozen already stay frozen.
    """
    frozen: dict[int, tuple[nn.Parameter, FrozenMaster]] = {}  # by identity: a tied head shares its embedding's codes
    for module in _fake_quant_modules(model):
        if module.weight.dtype != torch.int8:
            if id(module.weight) not in frozen:
                codes, scales = module.encoded()
                master = FrozenMaster(module.weight, scales)
                frozen[id(module.weight)] = nn.Parameter(codes, requires_grad=False), master
            module.weight, module.master = frozen[id(module.weight)]
    train_vectors_only(model)


def unfreeze_codes(model: nn.Module) -> None:
    """Train everything again after `freeze_codes`, in place.

    The master weights are moved along with the trained scales such that they encode to exactly the frozen codes, so
    nothing that the model computes changes.
    """
    for matrix in fake_quant_weights(model).values():
        if matrix.master is not None:
            assert matrix.scales is not None
            after = formats.stored_scales(matrix.scales)
            weight = formats.rebase_weight(
                matrix.master.weight, matrix.weight, matrix.master.scales, after, matrix.spec
            )
            with torch.no_grad():
                matrix.master.weight.copy_(weight)
    for module in _fake_quant_modules(model):
        if module.master is not None:
            module.weight, module.master = module.master.weight, None
    model.requires_grad_(True)


def train_vectors_only(model: nn.Module) -> None:
    """Require gradients of scales, norm gains and biases only, in place, and not of the weights of matrices.

    They are a thousandth of the parameters, and gains and biases mend what scales cannot: a shift of the outputs.
    """
    matrices = {id(module.weight) for module in _fake_quant_modules(model)}
    scales = {id(module.scales) for module in _fake_quant_modules(model)}
    for parameter in model.parameters():
        trained = id(parameter) in scales or parameter.ndim < 2
        parameter.requires_grad_(id(parameter) not in matrices and trained)


def _fake_quant_modules(model: nn.Module) -> list[FakeQuantWeight]:
    """Every fake-quantized module, including a head that is tied to the embedding."""
    return [module for module in model.modules() if isinstance(module, FakeQuantWeight)]


def gather_row_gradients(model: nn.Module, wanted: bool = True) -> dict[int, RowGradients]:
    """Let embeddings whose weight is the head's, too, give gradients of the rows that were looked up alone.

    The head's gradient is that of the whole weight: of a large vocabulary, another one beside it is 600 MB.

    Args:
        model: with fake-quantized modules.
        wanted: else all embeddings give gradients of whole weights again.

    Returns:
        identity of the weight -> where the gradients of rows go, which are to be added to the weight's own.
    """
    everywhere, gathered = _fake_quant_modules(model), dict[int, RowGradients]()
    for module in everywhere:
        if isinstance(module, FakeQuantEmbedding):
            tied = any(other is not module and other.weight is module.weight for other in everywhere)
            module.row_gradients = gathered.setdefault(id(module.weight), []) if wanted and tied else None
    return gathered


def fake_quant_weights(model: nn.Module) -> dict[str, FakeQuantWeight]:
    """Module path -> fake-quantized module, one per matrix: a head that is tied to the embedding is left out."""
    matrices: dict[str, FakeQuantWeight] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, FakeQuantWeight) and id(module.weight) not in seen:
            seen.add(id(module.weight))
            matrices[name] = module
    return matrices


@contextlib.contextmanager
def encoded_once(
    model: nn.Module, keep: bool = True, whole: Callable[[nn.Module], AbstractContextManager[None]] | None = None
) -> Iterator[dict[str, str]]:
    """Encode every matrix once for all forward passes inside the block.

    Args:
        model: with fake-quantized modules.
        keep: keep all decoded weights, in float32; else each pass encodes again, to the same codes, and the digests are
            what this is for.
        whole: of a model that is sharded: gives a matrix's module its whole weight inside a block.

    Yields:
        module path -> digest of the codes and scales that these passes use.
    """
    matrices = fake_quant_weights(model)
    by_weight = {id(module.weight): module for module in matrices.values()}
    everywhere = _fake_quant_modules(model)
    try:
        for module in matrices.values():
            with whole(module) if whole else contextlib.nullcontext():
                module.encode_once(keep)
        for module in everywhere:
            module.decoded_cache = by_weight[id(module.weight)].decoded_cache
        yield {name: module.digest for name, module in matrices.items()}
    finally:
        for module in everywhere:
            module.decoded_cache = None
            if isinstance(module, FakeQuantLinear):
                module.activations.forget()


@contextlib.contextmanager
def rounded_once(model: nn.Module) -> Iterator[None]:
    """Round every matrix at most once for all forward and backward passes inside the block, and keep the result.

    Codes change only when master weights or scales do, so these must not change inside. It takes the memory of all
    rounded weights in the dtype of the products.
    """
    rounded: Rounded = {}
    everywhere = _fake_quant_modules(model)
    try:
        for module in everywhere:
            module.rounded = rounded
        yield
    finally:
        for module in everywhere:
            module.rounded = None
