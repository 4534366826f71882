"""Safetensors of MLX (mlx-lm), `w = scale * q + bias`, where the bias is a multiple of the scale.

The matrix of a module P is `P.weight`, uint32 [rows, cols * bits / 32], each row a stream of unsigned fields of 2, 4 or
8 bits, low bits first; `P.scales` and `P.biases`, floating [rows, groups]. config.json has `quantization: {group_size,
bits}`. Ternary models (PrismML's Ternary Bonsai: 2 bits, groups of 128) have the bias -scale, so their fields 0, 1, 2
are the codes -1, 0, 1. MLX's own quantizer puts the bias anywhere; such matrices are refused by name.

Sources: `mlx.core.quantize` in the documentation of MLX; the model cards of prism-ml/Ternary-Bonsai-*-mlx-2bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgerazor.errors import UserError
from edgerazor.importers.core.base import Importer, IntegerMatrix, SourceModel, Stored, UnrepresentableError
from edgerazor.importers.core.safetensors_folder import FolderSource, read_settings

SCALES, BIASES = "scales", "biases"
WIDTHS = (2, 4, 8)
KEYS = ("quantization", "quantization_config")


class Mlx(Importer):
    """A folder whose settings have group size and bits, and no method."""

    name = "mlx"
    describe = "safetensors of MLX whose biases are multiples of their scales, as ternary models have them"

    def recognises(self, path: Path) -> bool:
        """Whether config.json has MLX's settings."""
        quantization = read_settings(path).get("quantization")
        if not isinstance(quantization, dict):
            return False
        return {"group_size", "bits"} <= quantization.keys() and "quant_method" not in quantization

    def open(self, path: Path) -> SourceModel:
        """Open the folder."""
        return MlxSource(path, read_settings(path))


class MlxSource(FolderSource):
    """Weights, scales and biases."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        super().__init__(path, {key: value for key, value in values.items() if key not in KEYS})
        quantization = values["quantization"]
        if quantization.get("mode", "affine") != "affine":
            raise UserError(f"{path} is quantized in MLX's mode {quantization['mode']!r}, and only affine is read.")
        self.overrides = {name: value for name, value in quantization.items() if isinstance(value, dict)}
        self.default = {key: quantization[key] for key in ("group_size", "bits")}
        for layout in (self.default, *self.overrides.values()):
            if any(not isinstance(value, int) or value < 1 for key, value in layout.items() if key in self.default):
                raise UserError(f"{path / 'config.json'} has a group size or number of bits that is none.")
        self.refuse_plain("MLX", "scales and biases")

    def names(self) -> set[str]:
        """Names of all tensors but scales and biases of quantized modules."""
        modules = {name.removesuffix(f".{SCALES}") for name in self.files if name.endswith(f".{SCALES}")}
        return set(self.files) - {f"{module}.{part}" for module in modules for part in (SCALES, BIASES)}

    def quantized(self, name: str) -> bool:
        """Whether the module has scales."""
        return name.endswith(".weight") and f"{name.removesuffix('.weight')}.{SCALES}" in self.files

    def read(self, name: str) -> Stored:
        """A tensor: integers where the module has scales."""
        if not self.quantized(name):
            return self.tensor(name)
        module = name.removesuffix(".weight")
        layout = {**self.default, **self.overrides.get(module, {})}
        if layout["bits"] not in WIDTHS or f"{module}.{BIASES}" not in self.files:
            raise UnrepresentableError(f"it has {layout['bits']} bits, or no biases")
        words = self.tensor(name)
        scales, biases = self.tensor(f"{module}.{SCALES}"), self.tensor(f"{module}.{BIASES}")
        columns = words.shape[-1] * 32 // layout["bits"]
        expected = (words.shape[0], columns // layout["group_size"])
        if words.dtype != torch.uint32 or words.dim() != 2 or columns % layout["group_size"]:
            raise UnrepresentableError("its shape does not go with its settings")
        if tuple(scales.shape) != expected or tuple(biases.shape) != expected:
            raise UnrepresentableError("its scales or biases do not go with its shape")
        return affine(unpacked(words, layout["bits"]), scales, biases, layout["group_size"])


def unpacked(words: Tensor, bits: int) -> Tensor:
    """Fields int16 [rows, n] of 32-bit words [rows, m], low bits first."""
    octets = words.contiguous().view(torch.uint8)  # little-endian, so low bits come first again
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    return (octets.unsqueeze(-1) >> shifts & (2**bits - 1)).flatten(1).to(torch.int16)


def affine(fields: Tensor, scales: Tensor, biases: Tensor, group_size: int) -> IntegerMatrix:
    """`scale * field + bias` as integers times a scale, exactly.

    Args:
        fields: int16 [rows, cols].
        scales, biases: floating [rows, groups].
        group_size: columns of a group.

    Raises:
        UnrepresentableError: a bias is no multiple of half its scale.
    """
    scales, biases = scales.double(), biases.double()
    flat = scales == 0
    halves = torch.where(flat, 0, (2 * biases / torch.where(flat, 1, scales)).round())  # bias in units of scale / 2
    if not torch.equal(halves * scales, 2 * biases) or float(halves.abs().max()) > 1 << 12:
        raise UnrepresentableError("its biases are no multiples of its scales")
    offsets = halves.to(torch.int16).repeat_interleave(group_size, dim=1)
    if bool((halves % 2 == 0).all()):
        return IntegerMatrix(fields + offsets // 2, scales, group_size)
    return IntegerMatrix(2 * fields + offsets, scales / 2, group_size)


IMPORTER = Mlx()
