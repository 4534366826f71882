"""16-bit checkpoints whose weights already lie on few levels: dequantized ternary models, published for training on.

A matrix is of that kind when in each group of a row every weight is 0 or plus or minus one number; then that number is
the scale, exactly, and nothing has to be stored beside the weights. The group size is the largest one that holds for
all rows (models of others have 128; PrismML's unpacked Ternary Bonsai, for instance). Rounding such weights anew would
change them, because the mean rule gives another scale. One decoder layer decides whether a folder is taken for such a
model; every matrix of it must be one, then, or stays floating if it is an embedding or the head.

`edgerazor pack FOLDER --bits 2` still rounds: it asks for something else.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgerazor.errors import UserError
from edgerazor.importers.core.base import Importer, IntegerMatrix, SourceModel, Stored, UnrepresentableError
from edgerazor.importers.core.safetensors_folder import FolderSource, read_settings

#: Tried in this order, after whole rows.
GROUPS = (1024, 512, 256, 128, 64, 32)
#: The matrix that is looked at first, small and in every family.
PROBE = re.compile(r".*\.layers\.0\.self_attn\.(o_proj|dense|out_proj)\.weight")
ROWS = 64


class Levels(Importer):
    """A folder like any other, but for its numbers."""

    name = "levels"
    describe = "16-bit safetensors of ternary models: in each group of a row, 0 and plus or minus one number"
    only = False

    def recognises(self, path: Path) -> bool:
        """Whether some rows of one matrix of the first decoder layer are ternary."""
        values = read_settings(path)
        if not values or "quantization_config" in values or "quantization" in values:
            return False
        try:
            return _probe(FolderSource(path, values))
        except UserError:
            return False

    def open(self, path: Path) -> SourceModel:
        """Open the folder."""
        return LevelsSource(path, read_settings(path))


class LevelsSource(FolderSource):
    """A folder's weights as their levels."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        super().__init__(path, values)
        outside = [name for name in self.files if ".layers." not in name and len(self.shape(name)) == 2]
        self.floating = {name for name in outside if ternary_groups(self.tensor(name)) is None}

    def quantized(self, name: str) -> bool:
        """Whether a tensor is a matrix of a decoder layer, or one outside that has few levels, too."""
        return name in self.files and len(self.shape(name)) == 2 and name not in self.floating

    def read(self, name: str) -> Stored:
        """Signs and magnitudes of a matrix; other tensors as they are."""
        tensor = self.tensor(name)
        if not self.quantized(name):
            return tensor
        matrix = ternary_groups(tensor)
        if matrix is None:
            raise UnrepresentableError("its weights are not 0 and plus or minus one number in each group of a row")
        return matrix


def _probe(source: FolderSource) -> bool:
    name = next((name for name in sorted(source.files) if PROBE.fullmatch(name)), None)
    if name is None or len(source.shape(name)) != 2:
        return False
    rows = source.files[name].get_slice(name)[:ROWS]
    return bool(rows.any()) and ternary_groups(rows) is not None


def ternary_groups(weight: Tensor) -> IntegerMatrix | None:
    """A matrix, floating [rows, cols], as signs and scales of the largest groups that have one magnitude each, if any.

    Columns that are no multiple of the group size end in a shorter group.
    """
    columns = weight.shape[1]
    magnitudes = weight.abs()
    for group in (columns, *(size for size in GROUPS if size < columns)):
        padded = torch.nn.functional.pad(magnitudes, (0, -columns % group)).unflatten(1, (-1, group))
        largest = padded.amax(dim=2, keepdim=True)
        if bool(((padded == 0) | (padded == largest)).all()) and bool(torch.isfinite(largest).all()):
            return IntegerMatrix(weight.sign().to(torch.int16), largest.squeeze(2), group)
    return None


IMPORTER = Levels()
