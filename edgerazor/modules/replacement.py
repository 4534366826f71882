"""The modules that replace nn.Linear and nn.Embedding, and the functions that put them in.

Training modules hold the float32 master weight and compute with `decode(encode(weight))`, so that what is trained
is what is packed. Packed modules hold a packed matrix and call the kernels. Both quantize their inputs the same way,
and keys and values enter attention through the same rounding, so the two compute the same numbers.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import PreTrainedModel

from edgerazor import formats, kernels
from edgerazor.errors import UserError
from edgerazor.formats import Encoded, MatrixSpec
from edgerazor.models import Structure, embedding_scale
from edgerazor.modules.attention import UNIMPORTANT_BITS, ImportantTokens, decided_by, quantize_cache, watch_tokens


@dataclass(frozen=True)
class Settings:
    """How a student and its packed model compute.

    Attributes:
        activation_bits: of the inputs of quantized linear layers; 16 leaves them as they are.
        kv_bits: of keys and values, likewise.
        group_size: consecutive activations of a token that share a scale.
        learned_scales, learned_inputs: whether the scales of weights, and of the inputs of linear layers, are trained;
            a packed model does not ask.
        learned_zero_points: whether these scales of inputs have zero points, which are trained with them.
        query_bits, probability_bits: of attention.
        adaptive_tokens: `causal` or `ranked` gives unimportant tokens fewer bits (see `attention.py`), `off` does not.
        thresholds: for `causal`, by layer.
    """

    activation_bits: int
    kv_bits: int
    group_size: int
    learned_scales: bool = False
    learned_inputs: bool = False
    query_bits: int = 16
    probability_bits: int = 16
    adaptive_tokens: str = "off"
    thresholds: tuple[float, ...] = ()
    learned_zero_points: bool = False


class Start(NamedTuple):
    """Where the training of a matrix begins, if not at the model's weight and the scales that follow from it.

    Attributes:
        weight: the master weight, float32 [rows, columns]; None: the model's own.
        scales: float16 [rows, groups], positive.
    """

    weight: Tensor | None
    scales: Tensor


#: The scale of a linear layer's input: a parameter where it is trained, a number where it is stored, else found anew.
InputScale: TypeAlias = nn.Parameter | float | None
#: Its zero point; None where codes are symmetric.
ZeroPoint: TypeAlias = nn.Parameter | float | None

#: Gives bool [batch, tokens]: which tokens of the current forward pass get all bits.
Important: TypeAlias = Callable[[], Tensor]


# --- training ----------------------------------------------------------------------------------


class SharedActivations:
    """Quantizes the inputs of linear layers, once for layers that share an input (q, k and v; gate and up)."""

    def __init__(self, bits: int, group_size: int) -> None:
        self.bits, self.group_size = bits, group_size
        self._input: weakref.ref[Tensor] | None = None
        self._state: tuple[Any, ...] | None = None
        self._output: Tensor | None = None

    def __call__(
        self,
        x: Tensor,
        scale: InputScale = None,
        important: Tensor | None = None,
        low_scale: InputScale = None,
        zero_point: ZeroPoint = None,
        low_zero_point: ZeroPoint = None,
    ) -> Tensor:
        """x [..., features] as the packed model sees it, in the dtype that products are computed in.

        `important`, bool [...], says which tokens get all bits; `low_scale`, `low_zero_point` are those of the others.

        The gradient is the straight-through one, or with a scale the one of `formats.fake_quantize_static`.
        """
        steps = (scale, zero_point, low_scale, low_zero_point)
        if x.is_inference():  # has no version to tell a change by
            return self._quantize(x, important, *steps)
        state = (torch.is_grad_enabled(), x._version, id(important), *map(_identity, steps))
        if self._input is not None and self._input() is x and self._state == state and self._output is not None:
            return self._output
        output = self._quantize(x, important, *steps)
        # first, because the last output may be all that keeps its own input, whose end calls `forget`
        self.forget()
        if output is not x:  # nothing was rounded: keeping it would only keep its memory
            self._input, self._state, self._output = weakref.ref(x, self.forget), state, output
        return output

    def _quantize(
        self,
        x: Tensor,
        important: Tensor | None,
        scale: InputScale,
        zero_point: ZeroPoint,
        low_scale: InputScale,
        low_zero_point: ZeroPoint,
    ) -> Tensor:
        quantized = x if self.bits == 16 else self._rounded(x, self.bits, scale, zero_point)
        if important is not None:
            fewer = self._rounded(x, UNIMPORTANT_BITS, low_scale, low_zero_point)
            quantized = torch.where(important.unsqueeze(-1), quantized, fewer)
        return quantized.to(product_dtype(x))

    def _rounded(self, x: Tensor, bits: int, scale: InputScale, zero_point: ZeroPoint) -> Tensor:
        if scale is None:
            return formats.fake_quantize_activations(x, bits, self.group_size)
        return formats.fake_quantize_static(x, bits, scale, zero_point)

    def forget(self, _dead: object = None) -> None:
        """Let go of the last activations; called by itself when their input is gone."""
        self._input = self._output = None


def _identity(scale: InputScale) -> object:
    """What changes when a scale does."""
    return (id(scale), scale._version) if isinstance(scale, Tensor) else scale


def product_dtype(x: Tensor) -> torch.dtype:
    """What matrix products with x are computed in: autocast's choice where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class FrozenMaster(NamedTuple):
    """What a matrix whose codes are fixed for a while was before.

    Attributes:
        weight: the master weight, float32 [rows, columns].
        scales: float16 [rows, groups], at which its codes are those that were fixed.
    """

    weight: nn.Parameter
    scales: Tensor


class FakeQuantWeight(nn.Module):
    """A master weight [rows, columns] and the formats it is trained for.

    Attributes:
        weight: float32; or int8, the codes, where they are fixed and only scales are trained.
            scales: float32 [rows, groups], where they are trained, or, without gradient, stay as they began; None
                where they follow from the weight, as the spec says.
            master: what `unfreeze_codes` goes on from; None where codes are not fixed, or were so from the start.
    """

    def __init__(self, weight: nn.Parameter, spec: MatrixSpec, scales: nn.Parameter | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.scales = scales
        self.spec = spec
        self.master: FrozenMaster | None = None
        self.frozen: Tensor | None = None
        self.digest = ""

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """decode(encode(weight)) [rows, columns] without gradient, computed in float32 and given in a dtype."""
        if self.frozen is not None:
            return self.frozen.to(dtype)
        if self.scales is not None:
            return formats.learned_weight(self.weight.detach(), self.scales, self.spec, dtype)
        return formats.quantize_dequantize(self.weight.detach(), self.spec, dtype)

    def inlet(self) -> Tensor:
        """Where the gradient with respect to the decoded weight goes, [rows, columns]; its value has no meaning.

        Where scales are not trained it passes straight through the rounding.
        """
        if self.scales is None or not self.scales.requires_grad:
            return self.weight
        return formats.ste_target(self.weight, self.scales, self.spec)

    def encoded(self) -> Encoded:
        """The codes and scales that it computes with."""
        return encode_trained(self.weight.detach(), self.scales, self.spec)

    def freeze(self) -> None:
        """Encode once for many forward passes, and keep the digest of the codes and scales they use."""
        encoded = self.encoded()
        self.digest = formats.digest(encoded, self.spec)
        self.frozen = formats.decode_matrix(encoded, self.spec)


def encode_trained(weight: Tensor, scales: Tensor | None, spec: MatrixSpec) -> Encoded:
    """Codes and scales of what training made.

    Args:
        weight: the master weight [rows, columns], or int8 for codes that were fixed.
        scales: float [rows, groups] if they were trained or stored.
        spec: formats of the rows.

    Raises:
        ValueError: as `formats.encode_matrix`, or codes come without scales.
    """
    if weight.dtype != torch.int8:
        return formats.encode_matrix(weight, spec, None if scales is None else formats.stored_scales(scales))
    if scales is None:
        raise ValueError("there are codes without scales")
    return Encoded(weight, formats.stored_scales(scales))


class _Product(torch.autograd.Function):
    """`x Ŵᵀ + b` with `Ŵ = decode(encode(W))`. Not Ŵ but the master weight is kept for backward, which decodes again.

    A copy of all decoded weights would be as large as the model; encoding twice costs a few percent of a step.
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
        to_x, to_weight, to_bias = ctx.needs_input_grad[:3]
        flat = gradient.flatten(0, -2)  # [n, out]
        return (
            gradient @ ctx.matrix.decoded(x.dtype) if to_x else None,
            (flat.T @ x.flatten(0, -2)).to(weight.dtype) if to_weight else None,
            flat.sum(0, dtype=weight.dtype) if to_bias else None,
            None,
        )


class FakeQuantLinear(FakeQuantWeight):
    """y = W x with quantized W and x. Takes the place of nn.Linear."""

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        spec: MatrixSpec,
        activations: SharedActivations,
        scales: nn.Parameter | None = None,
        input_scale: InputScale = None,
        low_input_scale: InputScale = None,
        input_zero_point: ZeroPoint = None,
        low_input_zero_point: ZeroPoint = None,
    ) -> None:
        super().__init__(weight, spec, scales)
        self.bias = bias
        self.activations = activations
        self.input_scale = input_scale
        self.low_input_scale = low_input_scale
        self.input_zero_point = input_zero_point
        self.low_input_zero_point = low_input_zero_point
        self.important: Important | None = None
        self.out_features, self.in_features = weight.shape

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return _Product.apply(self.quantized_input(x), self.inlet(), self.bias, self)

    def quantized_input(self, x: Tensor) -> Tensor:
        """What the weight is multiplied with for x [..., in], the same shape."""
        important = None if self.important is None else self.important()
        zero_points = (self.input_zero_point, self.low_input_zero_point)
        return self.activations(x, self.input_scale, important, self.low_input_scale, *zero_points)

    def as_head(self, states: Tensor) -> tuple[Tensor, dict[str, Tensor | None]]:
        """The same product for losses that make it themselves, a chunk of positions at a time.

        Returns:
            the quantized input in the dtype of the products, and `weight`, `bias` and `master` of `losses.Head`.
        """
        x = self.activations(states, self.input_scale, zero_point=self.input_zero_point)
        return x, {"weight": self.decoded(x.dtype), "bias": self.bias, "master": self.inlet()}


class FakeQuantEmbedding(FakeQuantWeight):
    """Rows of a quantized table. Takes the place of nn.Embedding."""

    def __init__(
        self, weight: nn.Parameter, spec: MatrixSpec, scale: float | None, scales: nn.Parameter | None = None
    ) -> None:
        super().__init__(weight, spec, scales)
        self.scale = scale
        self.num_embeddings, self.embedding_dim = weight.shape

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] int64 -> [..., columns]; only the rows looked up are quantized."""
        rows = self._looked_up(ids.reshape(-1)).view(*ids.shape, -1)
        return rows if self.scale is None else rows * self.scale

    def _looked_up(self, ids: Tensor) -> Tensor:
        """Quantized rows, float32 [n, columns], of ids [n], with gradients."""
        if self.frozen is not None:
            return self.frozen[ids]
        spec = self.spec.take(ids)
        if self.scales is None:
            return formats.fake_quantize_matrix(functional.embedding(ids, self.weight), spec)
        scales = functional.embedding(ids, self.scales)
        fixed = self.weight.dtype == torch.int8
        weight = self.weight[ids] if fixed else functional.embedding(ids, self.weight)
        inlet = formats.ste_target(weight, scales, spec) if self.scales.requires_grad else weight
        return formats.straight_through(inlet, lambda _: formats.learned_weight(weight.detach(), scales, spec))


def prepare_for_training(
    model: PreTrainedModel,
    structure: Structure,
    specs: Mapping[str, MatrixSpec],
    settings: Settings,
    scales_only: bool = False,
    input_scales: Mapping[str, float] | None = None,
    start: Callable[[str], Start | None] | None = None,
) -> None:
    """Put training modules in the place of every matrix, in place.

    Args:
        model: in float32.
        structure: where its matrices are.
        specs: module path -> formats, for each of `structure.targets`.
        settings: bits of activations and of attention, and whether scales are learned.
        scales_only: fix the codes, and train scales, norm gains and biases alone.
        input_scales: `P.input_scale` for each linear layer and the head P, and `P.low_input_scale` where tokens may
            have fewer bits; None: found anew each time.
        start: module path -> where its matrix begins, None for its own weight and the scales that its spec says.

    Raises:
        UserError: as `quantize_cache` and `decided_by`.
    """
    without_dropout(model)
    deciding = decided_by(model) if settings.adaptive_tokens != "off" else {}
    activations = SharedActivations(settings.activation_bits, settings.group_size)
    embedding = model.get_input_embeddings()
    head = model.get_output_embeddings()

    def trained(name: str, weight: nn.Parameter) -> tuple[nn.Parameter, nn.Parameter | None]:
        return _trained(weight, specs[name], settings.learned_scales, scales_only, start(name) if start else None)

    def put(name: str, weight: nn.Parameter, spec: MatrixSpec, scales: nn.Parameter | None) -> None:
        bias = model.get_submodule(name).bias
        of_inputs = [input_scale(f"{name}.{each}") for each in (formats.INPUT_SCALE, formats.LOW_INPUT_SCALE)]
        zero_points = [zero_point(scale) for scale in of_inputs]
        replace(model, name, FakeQuantLinear(weight, bias, spec, activations, scales, *of_inputs, *zero_points))

    def input_scale(path: str) -> InputScale:
        found = (input_scales or {}).get(path)
        return nn.Parameter(torch.tensor(found)) if found is not None and settings.learned_inputs else found

    def zero_point(scale: InputScale) -> ZeroPoint:
        """It begins at 0, where codes are those that calibrate found the scale for."""
        return None if scale is None or not settings.learned_zero_points else nn.Parameter(torch.tensor(0.0))

    spec = specs[structure.embedding.name]
    table = trained(structure.embedding.name, embedding.weight)
    replace(model, structure.embedding.name, FakeQuantEmbedding(table[0], spec, embedding_scale(embedding), table[1]))
    head_spec = specs[structure.head.name] if structure.head else spec
    output = trained(structure.head.name, head.weight) if structure.head else table
    put(structure.head_path, output[0], head_spec, output[1])
    for site in structure.linears:
        weight, scales = trained(site.name, model.get_submodule(site.name).weight)
        put(site.name, weight, specs[site.name], scales)
    _prepare_attention(model, settings, deciding)
    if scales_only:
        _train_vectors_alone(model)


def without_dropout(model: PreTrainedModel) -> None:
    """Switch off every random choice of a model's training mode, in place.

    The student copies what the teacher says when nothing is left out, dropped activations are noise of the size of what
    is to be learned, and random numbers would make a resumed training another one. Configurations keep such rates from
    pre-training: Phi 0.1, GPT-2, OPT and its skipped layers, Mixtral's noise of the router.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if _is_random_rate(name, value):
                setattr(module, name, 0.0)
    for config in {id(each): each for each in (model.config, model.config.get_text_config())}.values():
        for name, value in list(vars(config).items()):
            if _is_random_rate(name, value):
                setattr(config, name, 0.0)


#: Parts of the names that transformers gives to rates of random choices: attention_dropout, dropout, resid_pdrop,
#: layerdrop, router_jitter_noise.
RANDOM_RATES = ("dropout", "pdrop", "layerdrop", "jitter_noise")


def _is_random_rate(name: str, value: object) -> bool:
    """Whether an attribute is the rate of a random choice and not 0."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and value != 0 and any(part in name for part in RANDOM_RATES)


def _train_vectors_alone(model: nn.Module) -> None:
    """Train what is no weight of a matrix: scales, norm gains and biases.

    They are a thousandth of the parameters, and gains and biases mend what scales cannot: a shift of the outputs.
    """
    matrices = {id(module.weight) for module in _all_training(model)}
    scales = {id(module.scales) for module in _all_training(model)}
    for parameter in model.parameters():
        trained = id(parameter) in scales or parameter.ndim < 2
        parameter.requires_grad_(id(parameter) not in matrices and trained)


def _prepare_attention(model: PreTrainedModel, settings: Settings, deciding: Mapping[str, int]) -> None:
    """Round what enters attention, and tell the linear layers that depend on it which tokens are important."""
    if deciding:
        tokens = ImportantTokens(settings.thresholds if settings.adaptive_tokens == "causal" else None)
        watch_tokens(model, tokens)
        for name, layer in deciding.items():
            model.get_submodule(name).important = functools.partial(tokens.important, layer)
    quantize_cache(model, settings.kv_bits, settings.query_bits, settings.probability_bits)


def _trained(
    weight: nn.Parameter, spec: MatrixSpec, learned: bool, scales_only: bool, start: Start | None
) -> tuple[nn.Parameter, nn.Parameter | None]:
    """The parameters that a training of a matrix begins with: master weight or codes, and scales if they are stored.

    Without a start, learned scales begin where `formats.initial_scales` says, others follow from the weight.
    """
    if start is None:
        scales = formats.initial_scales(weight, spec) if learned else None
    else:
        scales = start.scales.to(weight.device, torch.float32)
        if start.weight is not None:
            weight = nn.Parameter(start.weight.to(weight.device), requires_grad=weight.requires_grad)
    if scales_only:
        encoded = formats.encode_matrix(weight, spec, scales)
        scales = encoded.scales.float() if scales is None else scales
        weight = nn.Parameter(encoded.codes, requires_grad=False)
    return weight, None if scales is None else nn.Parameter(scales, requires_grad=learned or scales_only)


def freeze_codes(model: nn.Module) -> None:
    """Fix the codes of every matrix where they are, in place; from now on scales, norm gains and biases are trained.

    Args:
        model: with training modules whose scales are trained; what is fixed already stays so.
    """
    fixed: dict[int, tuple[nn.Parameter, FrozenMaster]] = {}
    for module in _all_training(model):
        if module.weight.dtype != torch.int8:
            if id(module.weight) not in fixed:
                codes, scales = module.encoded()
                master = FrozenMaster(module.weight, scales)
                fixed[id(module.weight)] = nn.Parameter(codes, requires_grad=False), master
            module.weight, module.master = fixed[id(module.weight)]
    _train_vectors_alone(model)


def unfreeze_codes(model: nn.Module) -> None:
    """Train everything again after `freeze_codes`, in place.

    The master weights follow their scales, such that their codes are exactly the fixed ones: nothing that the model
    computes changes.
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
    for module in _all_training(model):
        if module.master is not None:
            module.weight, module.master = module.master.weight, None
    model.requires_grad_(True)


def _all_training(model: nn.Module) -> list[FakeQuantWeight]:
    """Every training module, a head tied to the embedding too."""
    return [module for module in model.modules() if isinstance(module, FakeQuantWeight)]


def fake_quant_weights(model: nn.Module) -> dict[str, FakeQuantWeight]:
    """Module path -> training module; a head tied to the embedding is left out."""
    found: dict[str, FakeQuantWeight] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, FakeQuantWeight) and id(module.weight) not in seen:
            seen.add(id(module.weight))
            found[name] = module
    return found


@contextlib.contextmanager
def frozen_codes(model: nn.Module) -> Iterator[dict[str, str]]:
    """Encode every matrix once for all forward passes inside; gives module path -> digest of what they use."""
    matrices = fake_quant_weights(model)
    by_weight = {id(module.weight): module for module in matrices.values()}
    everywhere = _all_training(model)
    try:
        for module in matrices.values():
            module.freeze()
        for module in everywhere:
            module.frozen = by_weight[id(module.weight)].frozen
        yield {name: module.digest for name, module in matrices.items()}
    finally:
        for module in everywhere:
            module.frozen = None
            if isinstance(module, FakeQuantLinear):
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
        load_stored: gives the matrix as it is stored, checked, or None where native kernels cannot compute with it.

    Attributes:
        keep_decoded: where no native kernels are in use, keep float32 weights after first use: fast in batches, 4 bytes
            a weight.
    """

    def __init__(
        self,
        load: Callable[[], tuple[Encoded, MatrixSpec]],
        load_stored: Callable[[], kernels.StoredMatrix | None] = lambda: None,
    ) -> None:
        self._load, self._load_stored = load, load_stored
        self._matrix: tuple[Encoded, MatrixSpec] | None = None
        self._stored: tuple[kernels.StoredMatrix | None] | None = None  # None: not asked for yet
        self._decoded: Tensor | None = None
        self.keep_decoded = False

    def stored(self, device: torch.device) -> kernels.StoredMatrix | None:
        """The matrix as it is stored, where the native kernels are in use and can compute with it."""
        if device.type != "cpu" or not kernels.is_native():
            return None
        if self._stored is None:
            self._stored = (self._load_stored(),)
        return self._stored[0]

    def kernel(self, device: torch.device) -> str:
        """Name of what computes with it on a device."""
        able = not kernels.is_native() or self.stored(device) is not None
        return kernels.name() if able else "reference"

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
        input_scale: float | None = None,
        low_input_scale: float | None = None,
        input_zero_point: float | None = None,
        low_input_zero_point: float | None = None,
    ) -> None:
        super().__init__(lazy)
        self.bias = bias
        self.out_features, self.in_features = shape
        self.activation_bits, self.group_size = activation_bits, group_size
        self.input_scale, self.low_input_scale = input_scale, low_input_scale
        self.input_zero_point, self.low_input_zero_point = input_zero_point, low_input_zero_point
        self.important: Important | None = None
        self._row_sums: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out] in the dtype of x; computed in float32."""
        full = (self.activation_bits, self.input_scale, self.input_zero_point)
        if self.important is None:
            return self._multiply(x, *full)
        important = self.important()
        y = x.new_empty(*x.shape[:-1], self.out_features)
        y[important] = self._multiply(x[important], *full)
        y[~important] = self._multiply(x[~important], UNIMPORTANT_BITS, self.low_input_scale, self.low_input_zero_point)
        return y

    def _multiply(self, x: Tensor, bits: int, scale: float | None, zero_point: float | None) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        if scale is None or not zero_point:
            return self._product(x, bias, bits, scale).to(x.dtype)
        shift = zero_point * scale  # codes are those of x + shift, and what it adds to every product is taken off again
        added = shift * self.row_sums(x.device)
        return self._product(x.float() + shift, -added if bias is None else bias - added, bits, scale).to(x.dtype)

    def row_sums(self, device: torch.device) -> Tensor:
        """Of the decoded weights, float32 [out]; read once."""
        if self._row_sums is None or self._row_sums.device != device:
            ones = torch.ones(1, self.in_features, device=device)
            self._row_sums = self._product(ones, None, kernels.UNQUANTIZED, None)[0]
        return self._row_sums

    def _product(self, x: Tensor, bias: Tensor | None, bits: int, scale: float | None) -> Tensor:
        """The product with x as the kernels round it, float32 [..., out]."""
        group = self.group_size
        stored = self.lazy.stored(x.device)
        if stored is not None:
            return stored.linear(x, bias, bits, group, scale)
        if self.lazy.keep_decoded:
            return kernels.decoded_linear(x, self.lazy.decoded(x.device), bias, bits, group, scale)
        encoded, spec = self.lazy.encoded(x.device)
        return kernels.linear(x, encoded, spec, bias, bits, group, scale)


class PackedEmbedding(PackedMatrix):
    """Rows of a packed table. Takes the place of nn.Embedding."""

    def __init__(self, lazy: LazyMatrix, scale: float | None, shape: tuple[int, int], dtype: torch.dtype) -> None:
        super().__init__(lazy)
        self.scale = scale
        self.num_embeddings, self.embedding_dim = shape
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)  # follows `model.to(dtype)`

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] int64 -> [..., columns]."""
        stored = self.lazy.stored(ids.device)
        rows = stored.embedding(ids) if stored else kernels.embedding(ids, *self.lazy.encoded(ids.device))
        rows = rows.to(self.like.dtype)
        return rows if self.scale is None else rows * self.scale


def install_packed(
    model: PreTrainedModel,
    shapes: Mapping[str, tuple[int, int]],
    tied: Mapping[str, str],
    load: Callable[[str], tuple[Encoded, MatrixSpec]],
    settings: Settings,
    dtype: torch.dtype,
    input_scales: Mapping[str, float] | None = None,
    load_stored: Callable[[str], kernels.StoredMatrix | None] = lambda _: None,
) -> None:
    """Put packed modules in the place of the named matrices, in place.

    Args:
        model: its modules may be on the meta device, their weights are never looked at.
        shapes: module path -> [rows, columns].
        tied: path of a head -> path of the embedding whose matrix it uses.
        load: reads the matrix of a module path.
        settings: bits of activations and of the cache.
        dtype: of the hidden states, which the embedding starts.
        input_scales: `P.input_scale` and `P.low_input_scale` of a linear layer P, and their zero points; the others are
            found anew each time, and symmetric.
        load_stored: reads the matrix of a module path as native kernels take it, None where they cannot.

    Raises:
        UserError: a named matrix has no place in the model.
    """
    deciding = decided_by(model) if settings.adaptive_tokens != "off" else {}
    lazy = {name: LazyMatrix(functools.partial(load, name), functools.partial(load_stored, name)) for name in shapes}
    for name, source in {**{name: name for name in shapes}, **tied}.items():
        shape = shapes[source]
        module = _place(model, name, shape)
        if isinstance(module, nn.Embedding):
            new: nn.Module = PackedEmbedding(lazy[source], embedding_scale(module), shape, dtype)
        else:
            of_inputs = ((input_scales or {}).get(f"{name}.{each}") for each in formats.OF_INPUTS)
            how = (settings.activation_bits, settings.group_size)
            new = PackedLinear(lazy[source], module.bias, shape, *how, *of_inputs)
        replace(model, name, new)
    _prepare_attention(model, settings, deciding)


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


def kernels_of(model: PreTrainedModel) -> str:
    """Names of the kernels that a packed model computes with, `avx512` or `avx512, reference`; reads its matrices."""
    matrices = (module for module in model.modules() if isinstance(module, PackedMatrix))
    return ", ".join(sorted({module.lazy.kernel(model.device) for module in matrices}))


def keep_decoded(model: nn.Module, keep: bool = True) -> None:
    """Keep the decoded weights of a packed model in memory, from their first use on, where kernels are not native."""
    for module in model.modules():
        if isinstance(module, PackedMatrix):
            module.lazy.keep_decoded = keep


def replace(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a path."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
