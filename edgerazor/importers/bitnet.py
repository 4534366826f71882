"""BitNet b1.58 as transformers stores it: ternary weights, one scale a matrix, four rows in a byte.

`P.weight` is uint8 [rows / 4, cols]: of a byte in row r, the field of bits 2i and 2i+1 is the weight of row
`i * rows / 4 + r`, plus one. `P.weight_scale` [1] is what the product is multiplied with (`autobitlinear`) or divided
by (`bitlinear`); the reciprocal is seldom a float16 number, and refused then. Inputs are rounded to 8 bits with one
scale a token, which is our group of all columns. Source: `transformers/integrations/bitnet.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from edgerazor.errors import UserError
from edgerazor.importers.core.base import Importer, IntegerMatrix, SourceModel, Stored, UnrepresentableError
from edgerazor.importers.core.safetensors_folder import FolderSource, read_settings

SCALE = "weight_scale"
ROWS = 4


class BitNet(Importer):
    """A folder with packed weights."""

    name = "bitnet"
    describe = "BitNet b1.58 safetensors of transformers, packed four weights to a byte"

    def recognises(self, path: Path) -> bool:
        """Whether config.json names this method."""
        quantization = read_settings(path).get("quantization_config")
        return isinstance(quantization, dict) and quantization.get("quant_method") == "bitnet"

    def open(self, path: Path) -> SourceModel:
        """Open the folder."""
        return BitNetSource(path, read_settings(path))


class BitNetSource(FolderSource):
    """Weights and scales; the model was trained with inputs of 8 bits."""

    activation_bits = 8

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        quantization = values.pop("quantization_config")
        if quantization.get("quantization_mode", "offline") != "offline" or quantization.get("use_rms_norm"):
            raise UserError(
                f"{path} holds weights that are quantized anew at each step, or norms inside of linear layers.",
                "Give a checkpoint with packed weights (quantization_mode offline, use_rms_norm false).",
            )
        super().__init__(path, values)
        self.refuse_plain("BitNet", f"a {SCALE}")
        self.divides = quantization.get("linear_class", "bitlinear") == "bitlinear"
        self.activation_group = max(int(self.config[key]) for key in ("hidden_size", "intermediate_size"))

    def names(self) -> set[str]:
        """Names of all tensors but the scales."""
        return {name for name in self.files if not name.endswith(f".{SCALE}")}

    def quantized(self, name: str) -> bool:
        """Whether the module has a scale."""
        return name.endswith(".weight") and f"{name.removesuffix('.weight')}.{SCALE}" in self.files

    def read(self, name: str) -> Stored:
        """A tensor: integers where the module has a scale."""
        module = name.removesuffix(".weight")
        stored = self.tensor(name)
        if not self.quantized(name):
            return stored
        scale = self.tensor(f"{module}.{SCALE}").double().reshape(-1)
        if stored.dtype != torch.uint8 or stored.dim() != 2 or len(scale) != 1:
            raise UnrepresentableError("it is not packed, or has several scales")
        values = torch.cat([(stored >> 2 * i & 3).to(torch.int16) - 1 for i in range(ROWS)])
        return IntegerMatrix(values, (1 / scale if self.divides else scale).expand(len(values), 1), values.shape[1])


IMPORTER = BitNet()
