"""GGUF files of llama.cpp whose blocks are integers times one scale: ternary, Q4_0, Q8_0, and others by their content.

`TQ1_0`, `TQ2_0`, `PTQ1_0`, `Q1_0`, `Q2_0`, `Q4_0`, `Q5_0` and `Q8_0` always are. `Q2_K` and `Q3_K` have sub-scales of
their own: where these are whole multiples of one number, as in files that we wrote, the weights are integers times
that; files of llama.cpp's quantizer seldom fit, and are refused by name. Floating tensors stay as they are.

Configuration and tokenizer come from `config.json` and `tokenizer.json` beside the file, if they are there, as those of
the original model. Else they are rebuilt from the metadata (`gguf_configuration` and `gguf_tokenizer` in `models`), and
what would compute otherwise is refused. Files of other types are teachers: `models/gguf_teacher.py`.

Sources: ggml-quants.c (`dequantize_row_*`) and ggml-common.h of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgerazor import families, models
from edgerazor.errors import UserError, plain
from edgerazor.exporters.core.gguf_metadata import gguf_architecture
from edgerazor.exporters.core.gguf_names import gguf_name
from edgerazor.importers.core.base import IntegerMatrix, SourceModel, Stored, UnrepresentableError
from edgerazor.models.gguf_configuration import POSITIONS, gguf_configuration
from edgerazor.models.gguf_tokenizer import write_tokenizer
from edgerazor.models.gguf_values import column_order, from_gguf, row_order
from edgerazor.untrusted.gguf_file import TYPES, GgufFile

Bytes = NDArray[np.uint8]
Values = NDArray[np.int16]
#: uint8 [blocks, bytes of a block] -> integers int16 [blocks, weights of a block] and their scales float32 [blocks].
Decoder = Callable[[Bytes], tuple[Values, NDArray[np.float32]]]


class GgufSource(SourceModel):
    """An opened file, with the names of transformers."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.folder = file.path.absolute().parent
        self.rebuilt = not (self.folder / "config.json").is_file()
        architecture = str(file.metadata.get("general.architecture"))
        self.config = rebuilt_config(file, architecture) if self.rebuilt else models.complete_config(self.folder)
        self.architecture = gguf_architecture(self.config)
        if self.architecture.name != architecture:
            raise UserError(
                f"{file.path} is a {architecture} model, but the config.json beside it is of a "
                f"{self.architecture.name} one.",
                "Move one of them to another folder.",
            )
        if self.architecture.experts:
            raise UserError(
                f"{file.path} is a mixture of experts, which is not taken as it is from GGUF.",
                f"Dequantize it and round it anew: `edgerazor pack {file.path} --bits 4`.",
            )
        self.shapes = _every_shape(self.config)
        known = {gguf_name(self.architecture, name): name for name in self.shapes}
        self.targets = {known[name]: name for name in file.tensors if name in known}
        unknown = sorted(file.tensors.keys() - known.keys() - POSITIONS)
        if unknown:
            raise UserError(f"{file.path} has the tensor {unknown[0]}, which no {architecture} model has here.")
        self.notes = ("Configuration rebuilt from metadata.",) if self.rebuilt else ()

    def names(self) -> set[str]:
        """Names of the tensors, as transformers has them."""
        return set(self.targets)

    def quantized(self, name: str) -> bool:
        """Whether a tensor's type is not a floating one."""
        return name in self.targets and self.file.type_name(self.targets[name]) not in FLOATS

    def read(self, name: str) -> Stored:
        """One tensor, with its rows, columns and gains as transformers has them."""
        target = self.targets[name]
        tensor, kind = self.file.tensors[target], self.file.type_name(target)
        blocks = self.file.blocks(target)
        order = row_order(self.architecture, self.config, target)
        back = None if order is None else torch.argsort(order)
        columns = column_order(self.architecture, self.config, target)
        if kind in FLOATS:
            values = torch.from_numpy(np.array(blocks)).view(FLOATS[kind]).reshape(tensor.shape)
            values = values if back is None else values[back]
            values = values if columns is None else values[:, torch.argsort(columns)]
            return from_gguf(self.architecture, name, values).reshape(self.shapes[name])
        if kind not in DECODERS or len(tensor.shape) != 2 or columns is not None:
            raise UnrepresentableError(f"its type {kind} is not integers times one scale in the order of transformers")
        values, scales = _matrix(blocks, DECODERS[kind], *tensor.shape)
        if back is not None:
            values, scales = values[back], scales[back]
        return IntegerMatrix(values, scales, TYPES[tensor.type][1])

    def write_tokenizer(self, folder: Path) -> None:
        """Copy the tokenizer beside the file, or rebuild one from metadata that gives the same metadata again."""
        models.copy_companions(self.folder, folder)
        if any(folder.glob("tokenizer*")):
            return
        try:
            write_tokenizer(self.file, folder)
        except UserError as error:
            raise UserError(
                f"The tokenizer of {self.file.path} cannot be rebuilt from its metadata: {error.message}",
                "Put tokenizer.json and tokenizer_config.json of the original model beside the file.",
            ) from None


def _matrix(blocks: Bytes, decode: Decoder, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Integers int16 [rows, columns] and scales float32 [rows, blocks of a row]."""
    values, scales = decode(blocks)
    return torch.from_numpy(values.reshape(rows, columns)), torch.from_numpy(scales.reshape(rows, -1).copy())


def _every_shape(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor that a model of a configuration may have, weights and biases, and its shape."""
    return {name: tuple(tensor.shape) for name, tensor in models.skeleton(dict(config)).state_dict().items()}


def rebuilt_config(file: GgufFile, architecture: str) -> dict[str, Any]:
    """Rebuild a configuration from metadata.

    Raises:
        UserError: of a family that is not known, incomplete, or with positions that metadata does not describe.
    """
    known = {
        family.gguf.name
        for family in families.available().values()
        if family.gguf and family.gguf.exported and family.gguf.configure and not family.gguf.parts
    }
    if architecture not in known:
        raise UserError(
            f"{file.path} is of the architecture {plain(architecture)}, and only {', '.join(sorted(known))} can be "
            "taken as they are from GGUF.",
            f"Dequantize it and round it anew: `edgerazor pack {file.path} --bits 4`."
            if architecture in families.from_gguf()
            else "Round the original model, from the folder or hub id that the file was made of: `edgerazor pack MODEL "
            "--bits 4`.",
        )
    return models.completed(gguf_configuration(file))


# Blocks -----------------------------------------------------------------------------------------------------------


def _half(octets: Bytes) -> NDArray[np.float32]:
    """Two bytes of each block as float16: [blocks, 2] -> [blocks]."""
    return np.ascontiguousarray(octets).view("<f2").reshape(-1).astype(np.float32)


def _fields(octets: Bytes, width: int, run: int) -> Values:
    """Fields of some bits, low ones first: of each run of bytes the first field of all, then the second of all ..."""
    shifts = np.arange(0, 8, width, dtype=np.uint8).reshape(1, 1, -1, 1)
    fields = octets.reshape(len(octets), -1, 1, run) >> shifts & (2**width - 1)
    return fields.reshape(len(octets), -1).astype(np.int16)


def _trits(octets: Bytes, count: int, run: int) -> Values:
    """Base-3 digits of fractions of 256, the first one first, in runs of bytes as `_fields`."""
    powers = np.array([1, 3, 9, 27, 81][:count], dtype=np.uint8).reshape(1, 1, -1, 1)
    multiplied = octets.reshape(len(octets), -1, 1, run) * powers  # modulo 256
    return (multiplied.reshape(len(octets), -1).astype(np.uint16) * 3 >> 8).astype(np.int16)


def _tq1_0(blocks: Bytes) -> tuple[Values, NDArray[np.float32]]:
    parts = [_trits(blocks[:, :32], 5, 32), _trits(blocks[:, 32:48], 5, 16), _trits(blocks[:, 48:52], 4, 4)]
    return np.concatenate(parts, axis=1) - np.int16(1), _half(blocks[:, 52:])


def _ptq1_0(blocks: Bytes) -> tuple[Values, NDArray[np.float32]]:
    """As TQ1_0 with half the weights: runs of 16, 8 and 2 bytes."""
    parts = [_trits(blocks[:, :16], 5, 16), _trits(blocks[:, 16:24], 5, 8), _trits(blocks[:, 24:26], 4, 2)]
    return np.concatenate(parts, axis=1) - np.int16(1), _half(blocks[:, 26:])


def _tq2_0(blocks: Bytes) -> tuple[Values, NDArray[np.float32]]:
    return _fields(blocks[:, :64], 2, 32) - np.int16(1), _half(blocks[:, 64:])


def _q1_0(blocks: Bytes) -> tuple[Values, NDArray[np.float32]]:
    return 2 * _fields(blocks[:, 2:], 1, 1) - np.int16(1), _half(blocks[:, :2])


def _q2_0(blocks: Bytes) -> tuple[Values, NDArray[np.float32]]:
    return _fields(blocks[:, 2:], 2, 1) - np.int16(1), _half(blocks[:, :2])


def _q4_0(blocks: Bytes) -> tuple[Values, NDArray[np.float32]]:
    return _fields(blocks[:, 2:], 4, 16) - np.int16(8), _half(blocks[:, :2])


def _q5_0(blocks: Bytes) -> tuple[Values, NDArray[np.float32]]:
    high = np.unpackbits(blocks[:, 2:6], axis=1, bitorder="little").astype(np.int16)
    return (_fields(blocks[:, 6:], 4, 16) | high << 4) - np.int16(16), _half(blocks[:, :2])


def _q8_0(blocks: Bytes) -> tuple[Values, NDArray[np.float32]]:
    return np.ascontiguousarray(blocks[:, 2:]).view(np.int8).astype(np.int16), _half(blocks[:, :2])


def _q2_k(blocks: Bytes) -> tuple[Values, NDArray[np.float32]]:
    """d * step * digit - dmin * offset for each 16 weights: integers times d where dmin is d, or has nothing to do."""
    scale, least = _half(blocks[:, 80:82]), _half(blocks[:, 82:84])
    steps, offsets = (blocks[:, :16] & 15).astype(np.int16), (blocks[:, :16] >> 4).astype(np.int16)
    if bool(((scale != least) & (least != 0) & offsets.any(axis=1)).any()):
        raise UnrepresentableError("its Q2_K blocks have minima that are no multiples of their scales")
    digits = _fields(blocks[:, 16:80], 2, 32).reshape(-1, 16, 16)
    offsets = offsets * (least != 0)[:, None]
    return (steps[:, :, None] * digits - offsets[:, :, None]).reshape(len(blocks), 256), scale


def _q3_k(blocks: Bytes) -> tuple[Values, NDArray[np.float32]]:
    """d * (sub-scale - 32) * level for each 16 weights."""
    packed = blocks[:, 96:108]
    low = _fields(packed[:, :8], 4, 8)
    steps = (low | _fields(packed[:, 8:], 2, 4) << 4) - 32
    digits = _fields(blocks[:, 32:96], 2, 32) | _fields(blocks[:, :32], 1, 32) << 2
    values = steps[:, :, None] * (digits - 4).reshape(-1, 16, 16)
    return values.reshape(len(blocks), 256).astype(np.int16), _half(blocks[:, 108:])


DECODERS: dict[str, Decoder] = {
    "TQ1_0": _tq1_0,
    "TQ2_0": _tq2_0,
    "PTQ1_0": _ptq1_0,
    "Q1_0": _q1_0,
    "Q2_0": _q2_0,
    "PQ2_0": _q2_0,
    "Q4_0": _q4_0,
    "Q5_0": _q5_0,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
}
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
