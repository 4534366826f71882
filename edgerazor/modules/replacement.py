"""Module replacement: put the modules of this room in the place of nn.Linear and nn.Embedding.

A student for training gets fake-quantized modules, a packed model gets packed ones. In both, keys and values enter
attention through the same rounding, so both compute the same numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from edgerazor import formats, kernels
from edgerazor.errors import UserError
from edgerazor.formats import Encoded, MatrixSpec, Rotation
from edgerazor.models import Structure, at_tokens, embedding_scale, expert_of
from edgerazor.modules.attention import ImportantTokens, attach_important_tokens, deciding_layers, quantize_attention
from edgerazor.modules.dropout import disable_dropout
from edgerazor.modules.fake_quant import FakeQuantEmbedding, FakeQuantLinear, train_vectors_only
from edgerazor.modules.packed_linear import LazyMatrix, PackedEmbedding, PackedLinear
from edgerazor.modules.settings import Settings
from edgerazor.modules.shared_activations import InputScales, SharedActivations


class InitialWeight(NamedTuple):
    """Initial master weight and scales of a matrix, where the training does not begin with rounding to nearest.

    Attributes:
        weight: the master weight, float32 [rows, columns], in the basis that codes are of; None: the model's own.
        scales: float16 [rows, groups], positive.
    """

    weight: Tensor | None
    scales: Tensor


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a path of a model, in place."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


# --- training ----------------------------------------------------------------------------------


def prepare_for_training(
    model: PreTrainedModel,
    structure: Structure,
    specs: Mapping[str, MatrixSpec],
    settings: Settings,
    scales_only: bool = False,
    input_scales: Mapping[str, float] | None = None,
    initial_weight: Callable[[str], InitialWeight | None] | None = None,
) -> None:
    """Replace every matrix by a fake-quantized module, in place.

    Args:
        model: in float32.
        structure: where its matrices are.
        specs: module path -> formats, for each of `structure.targets`.
        settings: bits of activations and of attention, and whether scales are learned.
        scales_only: freeze the codes, and train scales, norm gains and biases only.
        input_scales: `P.input_scale` for each linear layer and the head P, and `P.low_input_scale` where tokens may
            have fewer bits; None: scales of inputs are dynamic.
        initial_weight: module path -> initial weight and scales of its matrix; None for the model's own weight and the
            scales that its spec says.

    Raises:
        UserError: as `quantize_attention` and `deciding_layers`.
    """
    disable_dropout(model)
    deciding = deciding_layers(model) if settings.adaptive_tokens != "off" else {}
    activations = SharedActivations(settings.activation_bits, settings.group_size)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()

    def trainable(name: str, weight: nn.Parameter) -> tuple[nn.Parameter, nn.Parameter | None]:
        initial = initial_weight(name) if initial_weight else None
        return _trainable(weight, specs[name], settings.learned_scales, scales_only, initial)

    def replace_linear(name: str, weight: nn.Parameter, spec: MatrixSpec, scales: nn.Parameter | None) -> None:
        bias = model.get_submodule(name).bias
        of_input = _trainable_input_scales(name, input_scales or {}, settings)
        replace_module(model, name, FakeQuantLinear(weight, bias, spec, activations, scales, of_input))

    for target in structure.tables:
        own: Any = model.get_submodule(target.name)
        weight, scales = trainable(target.name, own.weight)
        spec = specs[target.name]
        replace_module(model, target.name, FakeQuantEmbedding(weight, spec, embedding_scale(own), scales))
    name = structure.embedding.name
    table, table_scales = trainable(name, embedding.weight)
    replace_module(model, name, FakeQuantEmbedding(table, specs[name], embedding_scale(embedding), table_scales))
    if structure.head:
        weight, scales = trainable(structure.head.name, head.weight)
        replace_linear(structure.head_path, weight, specs[structure.head.name], scales)
    else:
        replace_linear(structure.head_path, table, specs[name], table_scales)
    for target in structure.linears:
        weight, scales = trainable(target.name, model.get_submodule(target.name).weight)
        replace_linear(target.name, weight, specs[target.name], scales)
    _prepare_attention(model, settings, deciding)
    if scales_only:
        train_vectors_only(model)


def _trainable(
    weight: nn.Parameter, spec: MatrixSpec, learned: bool, scales_only: bool, initial: InitialWeight | None
) -> tuple[nn.Parameter, nn.Parameter | None]:
    """The parameters that the training of a matrix begins with: master weight or codes, and scales if they are stored.

    Without an initial weight, learned scales begin where `formats.initial_scales` says, others follow from the weight.
    """
    if initial is not None and initial.weight is not None:
        weight = nn.Parameter(initial.weight.to(weight.device), requires_grad=weight.requires_grad)
    elif spec.rotation is not None:
        weight = nn.Parameter(spec.rotate(weight.detach()), requires_grad=weight.requires_grad)
    if initial is None:
        scales = formats.initial_scales(weight, spec) if learned else None
    else:
        scales = initial.scales.to(weight.device, torch.float32)
    if scales_only:
        encoded = formats.encode_matrix(weight, spec, scales)
        scales = encoded.scales.float() if scales is None else scales
        weight = nn.Parameter(encoded.codes, requires_grad=False)
    return weight, None if scales is None else nn.Parameter(scales, requires_grad=learned or scales_only)


def _trainable_input_scales(name: str, stored: Mapping[str, float], settings: Settings) -> InputScales:
    """The scales and zero points of a linear layer's input that a training begins with.

    Zero points begin at 0, with which the codes are those that calibrate chose the scale for.
    """

    def scale(suffix: str) -> nn.Parameter | float | None:
        value = stored.get(f"{name}.{suffix}")
        return nn.Parameter(torch.tensor(value)) if value is not None and settings.learned_inputs else value

    def zero_point(scale: nn.Parameter | float | None) -> nn.Parameter | None:
        return None if scale is None or not settings.learned_zero_points else nn.Parameter(torch.tensor(0.0))

    full, low = scale(formats.INPUT_SCALE), scale(formats.LOW_INPUT_SCALE)
    return InputScales(full, low, zero_point(full), zero_point(low))


def _prepare_attention(model: PreTrainedModel, settings: Settings, deciding: Mapping[str, int]) -> None:
    """Round the inputs of attention, and tell the linear layers that depend on it which tokens are important."""
    if deciding:
        tokens = ImportantTokens(settings.thresholds if settings.adaptive_tokens == "causal" else None)
        attach_important_tokens(model, tokens)
        for name, layer in deciding.items():
            model.get_submodule(name).important = functools.partial(_important_inputs, model, name, tokens, layer)
    quantize_attention(model, settings.kv_bits, settings.query_bits, settings.probability_bits)


def _important_inputs(model: PreTrainedModel, name: str, tokens: ImportantTokens, layer: int) -> Tensor:
    """Which of a linear layer's inputs are important, bool: [batch, tokens], or [n] of those that an expert gets."""
    return at_tokens(expert_of(model, name), tokens.important(layer))


def quantize_inputs(model: PreTrainedModel, structure: Structure, settings: Settings) -> None:
    """Quantize the inputs of a 16-bit model's linear layers and its keys and values, in place; its weights stay.

    A model whose weights another tool has rounded then computes as a packed model of ours does, and can be compared
    with it.

    Args:
        model: with nn.Linear layers.
        structure: where they are.
        settings: bits of activations and of the KV cache.

    Raises:
        UserError: as `quantize_attention`.
    """
    activations = SharedActivations(settings.activation_bits, settings.group_size)
    for name in (*(target.name for target in structure.linears), structure.head_path):
        model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: (activations(inputs[0]), *inputs[1:]))
    quantize_attention(model, settings.kv_bits)


# --- packed ------------------------------------------------------------------------------------


def install_packed(
    model: PreTrainedModel,
    shapes: Mapping[str, tuple[int, int]],
    tied: Mapping[str, str],
    load: Callable[[str], tuple[Encoded, MatrixSpec]],
    settings: Settings,
    dtype: torch.dtype,
    input_scales: Mapping[str, float] | None = None,
    load_stored: Callable[[str], kernels.StoredMatrix | None] = lambda _: None,
    rotation_of: Callable[[int], Rotation | None] = lambda _: None,
) -> None:
    """Replace the named matrices by packed modules, in place.

    Args:
        model: its modules may be on the meta device, their weights are never read.
        shapes: module path -> (rows, columns).
        tied: path of a head -> path of the embedding whose matrix it uses.
        load: reads the matrix of a module path.
        settings: bits of activations and of attention.
        dtype: of the hidden states, which the embedding starts.
        input_scales: `P.input_scale` and `P.low_input_scale` of a linear layer P, and their zero points; scales of
            other inputs are dynamic and their codes symmetric.
        load_stored: reads the matrix of a module path as native kernels take it; None where they cannot.
        rotation_of: number of columns -> the rotation of matrices of so many; None where they are not rotated.

    Raises:
        UserError: a named matrix has no place in the model.
    """
    deciding = deciding_layers(model) if settings.adaptive_tokens != "off" else {}
    lazy = {name: LazyMatrix(functools.partial(load, name), functools.partial(load_stored, name)) for name in shapes}
    for name, source in {**{name: name for name in shapes}, **tied}.items():
        shape = shapes[source]
        original = _replaceable_module(model, name, shape)
        if isinstance(original, nn.Embedding):
            scale = embedding_scale(original)
            packed: nn.Module = PackedEmbedding(lazy[source], scale, shape, dtype, rotation_of(shape[1]))
        else:
            of_input = InputScales(*((input_scales or {}).get(f"{name}.{suffix}") for suffix in formats.OF_INPUTS))
            bits, group_size = settings.activation_bits, settings.group_size
            rotation = rotation_of(shape[1])
            packed = PackedLinear(lazy[source], original.bias, shape, bits, group_size, of_input, rotation)
        replace_module(model, name, packed)
    _prepare_attention(model, settings, deciding)


def _replaceable_module(model: nn.Module, name: str, shape: tuple[int, int]) -> nn.Linear | nn.Embedding:
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
