"""Plain Hugging Face safetensors, dequantized: `hf` in 16 bits, `hf-f32` in 32.

A code of b bits times a float16 scale has up to 11 + b significant bits, and float16 has 11. So 16 bits hold ternary
weights exactly, and others only by luck; 32 bits hold every format. Rotated weights are rotated back in float32 first,
and hardly fit in 16 bits. `hf` takes float16 where every weight of the model
is exact in it, else bfloat16 under the same condition; where neither holds them, it says which tensors would change.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from edgerazor.exporters.core import checkpoint_experts, hf_folder
from edgerazor.exporters.core.base import Exporter, ExportPlan, ExportResult, PlannedTensor
from edgerazor.exporters.core.exact_dtypes import holds
from edgerazor.packed import DTYPE_NAMES, DTYPES, PackedModel, size_table


class DequantizedPlan(ExportPlan):
    """A plan, and the one dtype of all weights (by its name in a safetensors file)."""

    dtype: str


class Dequantized(Exporter):
    """A folder that transformers and everything built on it reads, without us.

    Args:
        name: of the export.
        describe: what it is for.
        dtypes: the weights get the first that holds all of them exactly.
    """

    rotated = True

    def __init__(self, name: str, describe: str, dtypes: Sequence[torch.dtype]) -> None:
        self.name, self.describe, self.dtypes = name, describe, tuple(dtypes)

    def variants(self) -> Sequence[Exporter]:
        """`hf` and `hf-f32`."""
        return (EXPORTER, FLOAT32)

    def check(self, folder: Path) -> None:
        """Nothing is refused: the folder has the layout of the model that was packed."""

    def plan(self, model: PackedModel) -> DequantizedPlan:
        """Read every weight once, to see which dtype holds it."""
        dtype, changed = self._choose(model)
        tensors = tuple(_planned(model, dtype, changed))
        sizes = size_table(model)
        return DequantizedPlan(
            export=self.name,
            tensors=tensors,
            bytes=sum(tensor.bytes for tensor in tensors),
            packed_bytes=sizes.bytes,
            weights=sizes.parameters,
            causes=(f"Every weight takes {8 * dtype.itemsize} bits.",),
            notes=hf_folder.notes(model),
            dtype=DTYPE_NAMES[dtype],
        )

    def _choose(self, model: PackedModel) -> tuple[torch.dtype, set[str]]:
        """The dtype of the weights, and the names of tensors that are not exact in it.

        Where none is exact, it is the first whose range is wide enough.
        """
        changed: dict[torch.dtype, set[str]] = {dtype: set() for dtype in self.dtypes}
        narrow: set[torch.dtype] = set()
        for name, tensor in _weights(model):
            for dtype, names in changed.items():
                if not holds(dtype, tensor):
                    names.add(name)
                    if bool(tensor.to(dtype).isinf().any()):
                        narrow.add(dtype)
        exact = [dtype for dtype in self.dtypes if not changed[dtype]]
        chosen = [*exact, *(dtype for dtype in self.dtypes if dtype not in narrow), *self.dtypes][0]
        return chosen, changed[chosen]

    def write(self, model: PackedModel, folder: Path, plan: ExportPlan) -> ExportResult:
        """Write the weights and what makes the folder usable."""
        assert isinstance(plan, DequantizedPlan)
        matrices = checkpoint_experts.pieces(model, plan.dtype)
        rest = hf_folder.others_piece(model, lambda stored: plan.dtype if _is_float(stored) else stored)
        hf_folder.write_weights(folder, [*matrices, rest])
        hf_folder.write_companions(model, folder, dtype=str(DTYPES[plan.dtype]).removeprefix("torch."))
        return ExportResult.of(plan, folder, hf_folder.weight_bytes(folder))


def _weights(model: PackedModel) -> Iterator[tuple[str, Tensor]]:
    """Every floating tensor of the model, and its name in the packed model."""
    for name in model.header.matrices:
        yield name, hf_folder.decoded(model, name)
    tensors = model.others()
    yield from ((name, tensors[name]) for name, (dtype, _) in hf_folder.others(model).items() if _is_float(dtype))


def _planned(model: PackedModel, dtype: torch.dtype, changed: set[str]) -> Iterator[PlannedTensor]:
    """Each tensor of the model; numbers that are not floating keep their dtype."""
    reason = f"{DTYPE_NAMES[dtype]} rounds some of them, and `--export hf-f32` none"
    targets = checkpoint_experts.names(model)
    rest = {name: ("other", name, shape, own) for name, (own, shape) in hf_folder.others(model).items()}
    matrices = {name: (entry.kind, targets[name], entry.shape, "F32") for name, entry in model.header.matrices.items()}
    for name, (kind, target, shape, own) in {**matrices, **rest}.items():
        stored = DTYPE_NAMES[dtype] if _is_float(own) else own
        yield PlannedTensor(
            name=name,
            target=target,
            kind=kind,
            type=stored,
            weights=math.prod(shape),
            bytes=math.prod(shape) * DTYPES[stored].itemsize,
            reason=reason if name in changed else "",
        )


def _is_float(dtype: str) -> bool:
    return DTYPES[dtype].is_floating_point


EXPORTER = Dequantized("hf", "Hugging Face safetensors, dequantized to 16 bits", (torch.float16, torch.bfloat16))
FLOAT32 = Dequantized("hf-f32", "Hugging Face safetensors, dequantized to 32 bits", (torch.float32,))
