"""The container GGUF, versions 2 and 3: metadata, and tensors mapped from the file. Nothing in it is trusted.

(The `gguf` package has a reader, too. It refuses types that it does not know, as the ternary ones of forks, and takes
seconds for a large vocabulary.) Source: `docs/gguf.md` of ggml.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from edgerazor.errors import UserError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
#: Type of metadata -> its format of `struct`.
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
#: Number of a type -> name, weights and bytes of a block. Type 42 is Q2_0: blocks of 64 weights in llama.cpp, of 128 in
#: the fork that had it first, which calls the latter 142 now (PQ2_0).
TYPES: dict[int, tuple[str, int, int]] = {
    **{int(type_): (type_.name, *size) for type_, size in gguf.GGML_QUANT_SIZES.items()},
    41: ("Q1_0", 128, 18),
    42: ("Q2_0", 64, 18),
    142: ("PQ2_0", 128, 34),
    143: ("PTQ1_0", 128, 28),
}
Q2_0, PQ2_0 = 42, 142
#: Keys, tensors and strings that are read of a file, together: more than twice what the largest vocabularies need.
MOST_ENTRIES = 1 << 21
#: Metadata of a fork whose weights are in a rotated basis, and need each input rotated before the product.
ROTATED = "prism.hadamard."


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: shape, rows first; number of its type; offset from the beginning of the data."""

    shape: tuple[int, ...]
    type: int
    offset: int


class GgufFile:
    """An opened file.

    Attributes:
        metadata: key -> number, string or list.
        tensors: name -> where it lies.
    """

    def __init__(self, path: Path) -> None:
        """Read everything before the data.

        Raises:
            UserError: it is no GGUF file, cut off or damaged.
        """
        self.path = path
        try:
            self._data: NDArray[np.uint8] = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
            self._read()
        except UserError:
            raise
        except (OSError, ValueError, OverflowError, struct.error, RecursionError) as error:
            raise self.damaged(str(error) or type(error).__name__) from None

    def damaged(self, reason: str) -> UserError:
        """The error for a file that cannot be read."""
        return UserError(f"{self.path} is damaged or no GGUF file: {reason.rstrip('.')}.", "Download it again.")

    def type_name(self, name: str) -> str:
        """llama.cpp's name of a tensor's type."""
        number = self.tensors[name].type
        return TYPES[number][0] if number in TYPES else f"type {number}"

    def blocks(self, name: str) -> NDArray[np.uint8]:
        """A tensor's bytes, uint8 [blocks, bytes of a block].

        Raises:
            UserError: it does not lie within the file, or its type is not known.
        """
        tensor = self.tensors[name]
        if tensor.type not in TYPES:
            raise UserError(f"{self.path}: {name} has the unknown type {tensor.type}.", "Use a file of another type.")
        _, weights, size = TYPES[tensor.type]
        begin = self._start + tensor.offset
        count = math.prod(tensor.shape)
        if not tensor.shape or tensor.shape[-1] % weights or begin + count // weights * size > len(self._data):
            raise self.damaged(f"{name} does not lie within it, or its rows are no whole blocks")
        return self._data[begin : begin + count // weights * size].reshape(-1, size)

    def _read(self) -> None:
        if bytes(self._data[:4]) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        self._place, self._entries = 4, 0
        version = self._scalar("<I")
        if version not in VERSIONS:
            raise ValueError(f"it has version {version}, and versions 2 and 3 are read")
        count, keys = self._scalar("<Q"), self._scalar("<Q")
        self.metadata: Mapping[str, Any] = self._read_metadata(keys)
        if any(key.startswith(ROTATED) for key in self.metadata):
            raise UserError(
                f"{self.path} holds weights in a rotated basis (its metadata have {ROTATED}* keys), whose inputs would "
                "have to be rotated, too, and that is not supported.",
                "Give a file without rotation, or round the original model: `edgerazor pack MODEL --bits 4`.",
            )
        self.tensors: Mapping[str, Tensor] = self._read_tensor_infos(count)
        if not self.tensors:
            raise ValueError("it holds no tensors")
        alignment = self.metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ValueError("its alignment is no power of two")
        self._start = -(-self._place // alignment) * alignment
        self._settle_q2_0()

    def _count(self, entries: int) -> None:
        """Count keys, tensors or strings that come next, and refuse too many."""
        self._entries += entries
        if self._entries > MOST_ENTRIES:
            raise ValueError(f"it has more than {MOST_ENTRIES:,} keys, tensors and strings")

    def _read_metadata(self, count: int) -> dict[str, Any]:
        self._count(count)
        metadata: dict[str, Any] = {}
        for _ in range(count):
            key = self._string()
            if key in metadata:
                raise ValueError(f"it has {key} twice")
            metadata[key] = self._value(self._scalar("<I"))
        return metadata

    def _read_tensor_infos(self, count: int) -> dict[str, Tensor]:
        self._count(count)
        tensors: dict[str, Tensor] = {}
        for _ in range(count):
            name = self._string()
            dimensions = self._scalar("<I")
            if name in tensors or not 0 < dimensions <= 4:
                raise ValueError(f"it has {name} twice, or with {dimensions} dimensions")
            shape = tuple(self._scalar("<Q") for _ in range(dimensions))
            if min(shape) < 1 or math.prod(shape) > 1 << 48:
                raise ValueError(f"{name} has the impossible shape {list(shape)}")
            tensors[name] = Tensor(shape[::-1], self._scalar("<I"), self._scalar("<Q"))
        return tensors

    def _settle_q2_0(self) -> None:
        """Tell which blocks type 42 has: those of 128 weights are smaller, and leave no room for the others."""
        offsets = sorted(tensor.offset for tensor in self.tensors.values())
        ends = dict(zip(offsets, [*offsets[1:], len(self._data) - self._start], strict=True))
        doubtful = {name: tensor for name, tensor in self.tensors.items() if tensor.type == Q2_0}
        _, weights, size = TYPES[Q2_0]
        needed = {name: math.prod(tensor.shape) // weights * size for name, tensor in doubtful.items()}
        if any(ends[tensor.offset] - tensor.offset < needed[name] for name, tensor in doubtful.items()):
            fork = {name: replace(tensor, type=PQ2_0) for name, tensor in doubtful.items()}
            self.tensors = {**self.tensors, **fork}

    def _take(self, size: int) -> bytes:
        if size > len(self._data) - self._place:
            raise ValueError("it ends too early")
        self._place += size
        return self._data[self._place - size : self._place].tobytes()

    def _scalar(self, layout: str) -> Any:
        return struct.unpack(layout, self._take(struct.calcsize(layout)))[0]

    def _string(self) -> str:
        return self._take(self._scalar("<Q")).decode("utf-8", errors="replace")

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind in SCALARS:
            return self._scalar(SCALARS[kind])
        if kind != ARRAY:
            raise ValueError(f"metadata has the unknown type {kind}")
        inner, count = self._scalar("<I"), self._scalar("<Q")
        if inner in SCALARS:
            layout = SCALARS[inner]
            raw = self._take(count * struct.calcsize(layout))
            return np.frombuffer(raw, dtype=np.dtype(layout)).tolist()
        if count > len(self._data) - self._place:  # each takes a byte at least
            raise ValueError("it ends too early")
        self._count(count)
        return [self._value(inner) for _ in range(count)]
