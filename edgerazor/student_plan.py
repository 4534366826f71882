"""What a plan makes of a teacher: how the student computes, which tensors it stores, and how large it is when packed.

Nothing here reads a recipe or a file: plan, structure and measured numbers come in, answers go out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from edgerazor import formats, modules, packed
from edgerazor.allocate import Plan
from edgerazor.formats import MatrixSpec
from edgerazor.models import PreTrainedModel, Structure
from edgerazor.modules import attention
from edgerazor.packed import FolderSize
from edgerazor.recipe import Calibrate

#: Values of `calibrate.init` whose scales or codes calibrate finds with text, beside the plan.
CALIBRATED_INITS = ("clip", "gptq")
#: Models of so many features have outliers that a rotation spreads; those of fewer that were tried gain nothing.
ROTATED_WIDTH = 512
#: A number below 1 that JSON needs most characters for.
LONGEST_NUMBER = 1.2345678901234567e-05

#: Groups of weights that share a scale in a tower's matrices: the largest that divides their columns.
TOWER_GROUPS = (64, 32)
#: Path of a tower's matrix -> its format, and rows and columns.
TowerMatrices = dict[str, tuple[MatrixSpec, tuple[int, int]]]
#: Name of a tensor -> its dtype in safetensors and its shape.
TensorSpecs = dict[str, tuple[str, tuple[int, ...]]]


# --- what it needs -----------------------------------------------------------------------------


def needs_calibration(settings: Calibrate) -> bool:
    """Whether a model of these settings cannot be made without what calibrate measures, even without training."""
    return (
        settings.activation_scales != "dynamic"
        or settings.adaptive_tokens == "causal"
        or settings.init in CALIBRATED_INITS
    )


def check_attention(model: PreTrainedModel, settings: Plan | Calibrate) -> None:
    """Make sure that what enters attention can be rounded as the settings say, and tokens be told apart.

    Raises:
        UserError: the model's attention is not built for it.
    """
    attention.check_attention_bits(model, min(settings.kv_bits, settings.query_bits, settings.probability_bits))
    if settings.adaptive_tokens != "off":
        attention.deciding_layers(model)


# --- how it computes ---------------------------------------------------------------------------


def default_rotation(settings: Calibrate, width: int) -> Literal["hadamard"] | None:
    """The rotation of a student whose recipe says nothing of it (see `recipes/results/rotation.md`).

    Args:
        settings: a method that is followed as published (`init: rtn`) has no rotation.
        width: features of the hidden states.
    """
    return "hadamard" if width >= ROTATED_WIDTH and settings.init != "rtn" else None


def settings_of(plan: Plan, thresholds: Sequence[float] = ()) -> modules.Settings:
    """How a student of this plan computes.

    Args:
        plan: what calibrate or the recipe decided.
        thresholds: importance below which a token has few bits, one per decoder layer; none where all tokens are alike.
    """
    return modules.Settings(
        activation_bits=plan.activation_bits,
        kv_bits=plan.kv_bits,
        group_size=plan.group_size,
        learned_scales=plan.scales == "learned",
        learned_inputs=plan.activation_scales in ("learned", "asymmetric"),
        learned_zero_points=plan.activation_scales == "asymmetric",
        query_bits=plan.query_bits,
        probability_bits=plan.probability_bits,
        adaptive_tokens=plan.adaptive_tokens,
        thresholds=tuple(thresholds),
    )


def header_settings(settings: modules.Settings) -> dict[str, Any]:
    """The part of the settings that the header of a packed model holds, as JSON values."""
    return {name: getattr(settings, name) for name in packed.SETTINGS} | {"thresholds": list(settings.thresholds)}


# --- which tensors it stores -------------------------------------------------------------------


def tied_modules(structure: Structure) -> dict[str, str]:
    """Path of each module that uses another one's matrix -> path of that one."""
    return {} if structure.head else {structure.head_path: structure.embedding.name}


def matrix_tensors(structure: Structure) -> set[str]:
    """Names of all tensors that hold quantized matrices, or their trained scales."""
    paths = [*(site.name for site in structure.targets), structure.head_path]
    return {f"{path}.{part}" for path in paths for part in ("weight", "scales")}


def tower_matrices(model: PreTrainedModel, structure: Structure, format_name: str | None) -> TowerMatrices:
    """The linear layers of towers that are rounded; none without a format.

    Those whose columns are no multiple of the smallest group stay in 16 bits, as does whatever is no linear layer.
    """
    matrices: TowerMatrices = {}
    for tower in structure.towers if format_name else ():
        for name, module in model.get_submodule(tower).named_modules():
            if isinstance(module, nn.Linear):
                group = next((group for group in TOWER_GROUPS if module.in_features % group == 0), None)
                if group is not None:
                    path = f"{tower}.{name}" if name else tower
                    shape = module.out_features, module.in_features
                    matrices[path] = MatrixSpec((str(format_name),), group), shape
    return matrices


def rounded(weight: torch.Tensor, spec: MatrixSpec) -> torch.Tensor:
    """A matrix of a tower as it is packed, decoded: float32 [rows, columns]."""
    return formats.decode_matrix(formats.encode_matrix(weight.float(), spec), spec)


@torch.no_grad()
def round_towers(model: PreTrainedModel, matrices: TowerMatrices) -> None:
    """Round matrices of towers in place."""
    for path, (spec, _) in matrices.items():
        weight = model.get_submodule(path).weight
        weight.copy_(rounded(weight, spec))


def other_tensors(
    model: PreTrainedModel, structure: Structure, towers: Collection[str] = ()
) -> dict[str, torch.Tensor]:
    """The tensors of a model that are not quantized, by name; `towers`: paths of matrices of towers that are."""
    quantized = matrix_tensors(structure) | {f"{path}.weight" for path in towers}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in quantized}


def is_of_tower(name: str, structure: Structure) -> bool:
    """Whether a tensor belongs to a tower, which no training changes."""
    return any(name.startswith(f"{path}.") for path in structure.towers)


def in_sixteen_bits(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors that were not trained in bfloat16, if that holds all of their numbers, as where the teacher had it."""
    halves = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    return halves if all(torch.equal(halves[name].to(one.dtype), one) for name, one in tensors.items()) else tensors


def other_specs(
    model: PreTrainedModel, structure: Structure, as_float32: bool, towers: Collection[str] = ()
) -> TensorSpecs:
    """The tensors that are not quantized as they will be stored: a student's, which is trained in float32, as that.

    Those of a tower, which is not trained, are stored in 16 bits where these hold them (`in_sixteen_bits`); of a tower
    without values, as of a dry run, the dtype tells.
    """
    others = other_tensors(model, structure, towers)
    specs: TensorSpecs = {name: packed.tensor_spec(name, tensor) for name, tensor in others.items()}
    if not as_float32:
        return specs
    floating = {name: shape for name, (dtype, shape) in specs.items() if packed.DTYPES[dtype].is_floating_point}
    stored: TensorSpecs = {name: ("F32", shape) for name, shape in floating.items()}
    of_towers = {name: others[name] for name in floating if is_of_tower(name, structure)}
    has_values = not any(tensor.is_meta for tensor in of_towers.values())
    held = in_sixteen_bits(of_towers) if has_values else of_towers
    if all(tensor.dtype == torch.bfloat16 for tensor in held.values()):
        stored |= {name: ("BF16", floating[name]) for name in of_towers}
    return specs | stored


def input_scale_names(
    settings: Plan | Calibrate, model: PreTrainedModel, structure: Structure
) -> dict[str, tuple[str, int]]:
    """The stored scales of inputs: `P.input_scale` -> its linear layer P, and the bits.

    Args:
        settings: say whether scales are stored, or found anew for each token, when there are none; tokens with fewer
            bits have a scale of their own, `P.low_input_scale`.
        model: where the linear layers are.
        structure: of the model.

    Raises:
        UserError: the model's tokens cannot have bits of their own.
    """
    if settings.activation_scales == "dynamic":
        return {}
    paths = (*(site.name for site in structure.linears), structure.head_path)
    scales = {f"{path}.{formats.INPUT_SCALE}": (path, settings.activation_bits) for path in paths}
    if settings.adaptive_tokens != "off":
        for path in attention.deciding_layers(model):
            scales[f"{path}.{formats.LOW_INPUT_SCALE}"] = (path, attention.UNIMPORTANT_BITS)
    return scales


def _input_tensors(plan: Plan, model: PreTrainedModel, structure: Structure) -> list[str]:
    """Names of all tensors that are stored of inputs: scales, and their zero points where there are any."""
    scales = list(input_scale_names(plan, model, structure))
    if plan.activation_scales != "asymmetric":
        return scales
    zero_points = {formats.INPUT_SCALE: formats.INPUT_ZERO_POINT, formats.LOW_INPUT_SCALE: formats.LOW_INPUT_ZERO_POINT}
    split = (name.rpartition(".") for name in scales)
    return [*scales, *(f"{path}.{zero_points[kind]}" for path, _, kind in split)]


# --- how large it is ---------------------------------------------------------------------------


def packed_size(
    plan: Plan,
    model: PreTrainedModel,
    structure: Structure,
    others: TensorSpecs,
    settings: Mapping[str, Any],
    provenance: Mapping[str, Any],
    shard_bytes: int,
    towers: TowerMatrices | None = None,
) -> FolderSize:
    """What `pack` would write of a plan, to the byte.

    Args:
        plan: formats of all matrices.
        model: the teacher; only names of its modules count.
        structure: of the model.
        others: as `other_specs`.
        settings, provenance: of the header.
        shard_bytes: size of shards.
        towers: matrices of towers that are rounded.
    """
    matrices: list[tuple[str, packed.Kind, MatrixSpec, tuple[int, int]]] = [
        (matrix.name, matrix.kind, matrix.spec(), matrix.shape) for matrix in plan.matrices
    ]
    matrices += [(path, "tower", spec, shape) for path, (spec, shape) in (towers or {}).items()]
    return packed.predict(
        matrices,
        others | dict.fromkeys(_input_tensors(plan, model, structure), ("F32", ())),
        tied=tied_modules(structure),
        settings=dict(settings),
        provenance=dict(provenance),
        shard_bytes=shard_bytes,
    )
