"""compressed-tensors, layout `pack-quantized`, for vLLM, SGLang and transformers: integers of 2 to 8 bits in groups.

A linear layer [rows, cols] at path P becomes

- `P.weight_packed`, int32 [rows, ceil(cols * bits / 32)]: integer + 2^(bits-1), low bits and words first, row by row;
- `P.weight_scale`, float16 [rows, groups], or [rows, 1] for one scale a row;
- `P.weight_shape`, int64 [2]: rows and cols.

Source: `PackedQuantizationCompressor` of the compressed-tensors package, version 0.20: 32 integers fill exactly `bits`
words, whatever the width. Scales are exact where the model computes in float16 (config.json asks for it) or float32;
bfloat16 would round them.

vLLM's Marlin kernels take widths of 4 and 8 in groups of 32, 64, 128 or whole rows; other widths run in its Humming
kernels since June 2026 (its pull requests 34556 and 46389), which take any group of at least 16. So layers of 4 or 8
bits get groups of at most 128, and others of at most 256, unless whole rows share a scale.

`compressed-tensors` says nothing of inputs, so programs leave them at 16 bits. `compressed-tensors-a8` asks for inputs
in 8 bits, dynamic and symmetric, in the groups of the packed model or smaller ones: refused where that model does not
compute so itself. Weights are the same bit for bit; inputs are rounded by the program's own rule (the package divides
the largest of a group by 127.5, and we by 127).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from edgerazor import formats
from edgerazor.errors import UserError
from edgerazor.exporters.core import hf_folder, integers
from edgerazor.exporters.core.base import Exporter
from edgerazor.exporters.core.grouped import KNOWN_GROUPS, GroupedExporter, GroupedPlan, Layout
from edgerazor.exporters.core.integers import Integers
from edgerazor.formats import OF_INPUTS
from edgerazor.packed import PackedModel, TensorSpec

#: Widths that Marlin has; for others there is Humming alone.
MARLIN = (4, 8)
#: The smallest group, of weights or inputs, that Humming takes where inputs have 8 bits.
SMALLEST_GROUP = 32


class CompressedTensors(GroupedExporter):
    """Layers of one layout form one config group.

    Args:
        name: as in `--export`.
        describe: what it is for.
        inputs: whether the folder asks for inputs of linear layers in 8 bits.
    """

    widths = (2, 3, 4, 5, 6, 7, 8)

    def __init__(self, name: str, describe: str, *, inputs: bool) -> None:
        self.name, self.describe, self.inputs = name, describe, inputs

    def variants(self) -> Sequence[Exporter]:
        """`compressed-tensors` and `compressed-tensors-a8`."""
        return (EXPORTER, EIGHT_BIT_INPUTS)

    def known_groups(self, bits: int) -> Sequence[int]:
        """Those of Marlin; where only Humming runs a width, 256, too."""
        return KNOWN_GROUPS if bits in MARLIN else (256, *KNOWN_GROUPS)

    def plan(self, model: PackedModel) -> GroupedPlan:
        """As `GroupedExporter.plan`.

        Raises:
            UserError: also where the packed model rounds inputs differently from what the folder would ask for.
        """
        if self.inputs:
            self._check_inputs(model)
        plan = super().plan(model)
        if self.inputs:
            for name, layout in plan.layouts.items():
                self._input_group(model, name)
                if layout.group_size < SMALLEST_GROUP:
                    raise UserError(
                        f"{self.name} cannot hold {name}: its groups of {layout.group_size} weights are smaller than "
                        f"the {SMALLEST_GROUP} that kernels for inputs of 8 bits take.",
                        HINT,
                    )
        return plan

    def notes(self, model: PackedModel) -> tuple[str, ...]:
        """What the folder cannot say, or says in its own way."""
        if not self.inputs:
            return super().notes(model)
        rule = "Inputs are rounded to 8 bits as the packed model's are, but by the rule of the program that reads this."
        return (rule, *hf_folder.notes(model, of_inputs=False))

    def _check_inputs(self, model: PackedModel) -> None:
        """Raise UserError unless a packed model rounds all inputs to 8 bits with dynamic scales."""
        settings = model.header.settings
        bits, adaptive = settings.get("activation_bits", 16), settings.get("adaptive_tokens", "off")
        stored = next((name for name in model.header.others if name.rpartition(".")[2] in OF_INPUTS), "")
        if bits != 8:
            reason = f"rounds inputs to {bits} bits, not to 8" if bits != 16 else "does not round inputs"
        elif adaptive != "off":
            reason = "gives some tokens fewer bits"
        elif stored:
            reason = f"has stored scales of inputs ({stored}), not dynamic ones"
        else:
            return
        raise UserError(f"{self.name} would compute otherwise: the packed model {reason}.", HINT)

    def _input_group(self, model: PackedModel, name: str) -> int | None:
        """Inputs of a layer that share a scale: those of the packed model or fewer, in whole groups; 0 for all of them.

        None: inputs stay as they are.

        Raises:
            UserError: only groups that Humming does not take.
        """
        if not self.inputs:
            return None
        columns, group = model.header.matrices[name].shape[1], int(str(model.header.settings["group_size"]))
        if group >= columns:
            return 0
        common = math.gcd(columns, group)
        if common < SMALLEST_GROUP:
            raise UserError(
                f"{self.name} cannot round inputs as the packed model: the {columns} inputs of {name} are no whole "
                f"groups of {group}, and a common divisor below {SMALLEST_GROUP} is no group that kernels take.",
                HINT,
            )
        return common

    def specs(self, name: str, shape: tuple[int, int], layout: Layout) -> dict[str, TensorSpec]:
        """Packed integers, scales and shape."""
        rows, columns = shape
        return {
            f"{name}.weight_packed": ("I32", (rows, -(-columns * layout.bits // 32))),
            f"{name}.weight_scale": ("F16", (rows, formats.group_count(columns, layout.group_size))),
            f"{name}.weight_shape": ("I64", (2,)),
        }

    def tensors(self, name: str, matrix: Integers, layout: Layout) -> dict[str, Tensor]:
        """The tensors of `specs`, from integers in groups of the layout's size."""
        return {
            f"{name}.weight_packed": integers.words(matrix.values.int() + 2 ** (layout.bits - 1), layout.bits),
            f"{name}.weight_scale": matrix.scales,
            f"{name}.weight_shape": torch.tensor(matrix.values.shape),
        }

    def settings(self, model: PackedModel, layouts: Mapping[str, Layout]) -> dict[str, Any]:
        """One config group for each layout; layers are named where there are several."""
        schemes: dict[tuple[int, int | None, int | None], list[str]] = {}
        for name, layout in layouts.items():
            group = layout.known_group(model.header.matrices[name].shape[1])
            schemes.setdefault((layout.bits, group, self._input_group(model, name)), []).append(name)
        groups = {
            f"group_{number}": {
                "targets": ["Linear"] if len(schemes) == 1 else names,
                "weights": _arguments(bits, "channel" if group is None else "group", group),
                "input_activations": None
                if inputs is None
                else _arguments(8, "group" if inputs else "token", inputs or None, dynamic=True),
                "output_activations": None,
                # The package takes integers with rounded inputs for bytes that are not packed, unless it is told.
                **({} if inputs is None else {"format": "pack-quantized"}),
            }
            for number, ((bits, group, inputs), names) in enumerate(sorted(schemes.items(), key=str))
        }
        matrices = {name for name, entry in model.header.matrices.items() if entry.kind != "embedding"}
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": sorted((matrices | model.header.tied.keys()) - layouts.keys()),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }


def _arguments(bits: int, strategy: str, group_size: int | None, *, dynamic: bool = False) -> dict[str, Any]:
    """`QuantizationArgs` as the package writes them."""
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": strategy,
        "group_size": group_size,
        "actorder": None,
        "block_structure": None,
        "dynamic": dynamic,
    }


HINT = "`--export compressed-tensors` leaves inputs at 16 bits."
EXPORTER = CompressedTensors(
    "compressed-tensors", "compressed-tensors (pack-quantized, 2 to 8 bits) for vLLM and transformers", inputs=False
)
EIGHT_BIT_INPUTS = CompressedTensors(
    "compressed-tensors-a8", "the same, which asks for inputs in 8 bits, dynamic, as the packed model does", inputs=True
)
