"""A stranger's weight files, read without mapping them: where each tensor lies, and one tensor at a time.

A mapped file takes as much of a process's address space as it is large, whatever is read of it. Here only the header is
read, and then the bytes of the tensors that are asked for. The format is that of safetensors: the length of a JSON
header in 8 bytes, the header, and the tensors one behind the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgerazor.errors import UserError, plain
from edgerazor.untrusted.documents import MOST_ENTRIES_OF_TOKENIZERS, parse_json
from edgerazor.untrusted.weights import AGAIN, weight_files

#: Most bytes of a header, as the safetensors library has it.
MOST_HEADER_BYTES = 100_000_000
#: What the format calls the dtypes that weights may have.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor lies.

    Attributes:
        name: of the tensor.
        file: that holds it.
        dtype: of its numbers; None of those that are no floating point numbers.
        shape: of the tensor.
        begin: its first byte in the file.
        nbytes: how many it takes.
    """

    name: str
    file: Path
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    begin: int
    nbytes: int

    def read(self) -> Tensor:
        """The tensor, on the CPU.

        Raises:
            UserError: its numbers are none that a weight may have, or the file has become shorter.
        """
        if self.dtype is None:
            raise UserError(f"{self.file} stores {plain(self.name)} in numbers that are no 16- or 32-bit weights.")
        values = torch.empty(self.shape, dtype=self.dtype)
        buffer = values.view(-1).view(torch.uint8).numpy().data if values.numel() else None
        with open(self.file, "rb") as file:
            file.seek(self.begin)
            if buffer is not None and file.readinto(buffer) != self.nbytes:
                raise UserError(f"The weight file {self.file} is damaged: it ends early.", AGAIN)
        return values

    def some_rows(self, most: int) -> Tensor:
        """At most so many rows of a matrix, evenly spread, and no others are read; of what is no matrix, everything.

        Raises:
            UserError: as `read`.
        """
        if self.dtype is None or len(self.shape) != 2 or not self.nbytes:
            return self.read()
        try:
            stored = np.memmap(self.file, np.uint8, "r", self.begin, (self.shape[0], self.nbytes // self.shape[0]))
        except (OSError, ValueError):
            raise UserError(f"The weight file {self.file} is damaged: it ends early.", AGAIN) from None
        return torch.from_numpy(np.array(stored[:: -(-self.shape[0] // most)])).view(self.dtype)


def tensor_places(folder: Path) -> dict[str, TensorPlace]:
    """Where every tensor of a folder's model lies, by its name.

    Raises:
        UserError: a file is missing or damaged, or two of them hold the same tensor.
    """
    places: dict[str, TensorPlace] = {}
    for place in all_places(folder):
        if place.name in places:
            raise UserError(
                f"{places[place.name].file.name} and {place.file.name} in {folder} both hold {plain(place.name)}.",
                "Delete the file that does not belong to the model.",
            )
        places[place.name] = place
    return places


def all_places(folder: Path) -> list[TensorPlace]:
    """Where every tensor of the files of a folder's model lies, one that is stored twice included.

    Raises:
        UserError: a file is missing or damaged.
    """
    places: list[TensorPlace] = []
    for file in weight_files(folder):
        try:
            places += _places(file)
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = plain(" ".join(str(error).split()).rstrip("."), 200)
            raise UserError(f"The weight file {file} is damaged: {reason}.", AGAIN) from None
    return places


def _places(file: Path) -> Iterator[TensorPlace]:
    """The tensors of a file, each checked to lie inside it."""
    size = file.stat().st_size
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or not 2 <= length <= min(MOST_HEADER_BYTES, size - 8):
            raise ValueError("its header has no possible length")
        header: dict[str, Any] = parse_json(
            opened.read(length), dict, unambiguous=True, most_entries=MOST_ENTRIES_OF_TOKENIZERS
        )
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, shape, (begin, end) = DTYPES.get(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
        if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
            raise ValueError(f"{name} has an impossible shape or place")
        if not begin <= end <= size - 8 - length:
            raise ValueError(f"{name} lies outside of the file")
        if dtype is not None and math.prod(shape) * dtype.itemsize != end - begin:
            raise ValueError(f"{name} takes another number of bytes than its shape")
        yield TensorPlace(name, file, dtype, shape, 8 + length + begin, end - begin)
