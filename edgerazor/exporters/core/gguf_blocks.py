"""Codes and scales as the blocks of GGML types, without a quantizer in between.

A GGML type stores blocks of 32 or 256 consecutive weights of a row: one or two fp16 numbers and small integers. Ours
are small integers times an fp16 number, too, so the question is only whether the integers fit and whether one fp16
number serves a whole block. To ask it alike for all of our formats, a matrix first becomes *levels*: integers, and
a *unit* per group, such that weight = level * unit. Formats whose levels are whole have their scale as unit;
half-offset `int2` (-3/2, -1/2, 1/2, 3/2 times the scale) has the odd levels -3 to 3 and half its scale, which fp16
holds exactly unless the scale is an odd subnormal.

Layouts follow ggml-quants.c and ggml-common.h of llama.cpp; `gguf.quants` reads them, and the tests compare with it.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgerazor import formats
from edgerazor.exporters.core.integers import UnfitError, integers
from edgerazor.formats import Encoded, MatrixSpec
from edgerazor.untrusted.gguf_file import TYPES

#: Weights converted at a time.
CHUNK = 1 << 22

Bytes = NDArray[np.uint8]
Levels = NDArray[np.int16]
Units = NDArray[np.float16]


class NewType(enum.IntEnum):
    """Types that llama.cpp has and version 0.19 of the gguf package does not name: their numbers in ggml.h."""

    Q2_0 = 42


GgmlType: TypeAlias = gguf.GGMLQuantizationType | NewType
#: Number of a type -> weights and bytes of a block.
SIZES = {number: (weights, octets) for number, (_, weights, octets) in TYPES.items()}


def ggml_type(name: str) -> GgmlType:
    """The type of that name."""
    return NewType[name] if name in NewType.__members__ else gguf.GGMLQuantizationType[name]


class InexactError(Exception):
    """A type cannot hold some block exactly; the message says why. The next type is tried."""


@dataclass(frozen=True)
class Block:
    """A GGML type that stores integers and fp16 numbers.

    Attributes:
        type: its name.
        lowest, highest: the levels that it holds.
        write: levels int16 [blocks, block] and units float16 [blocks] -> bytes uint8 [blocks, bytes of a block].
        check: levels int16 [blocks, block]; raises InexactError where the range does not say all.
    """

    type: GgmlType
    lowest: int
    highest: int
    write: Callable[[Levels, Units], Bytes]
    check: Callable[[Levels], object] = lambda levels: None

    @property
    def size(self) -> int:
        """Weights of a block."""
        return SIZES[self.type][0]

    @property
    def bits(self) -> float:
        """Bits a weight."""
        size, count = SIZES[self.type]
        return 8 * count / size


# Levels and units -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockMatrix:
    """A quantized matrix on its way into blocks.

    Attributes:
        encoded: codes int8 [rows, cols] and scales float16 [rows, groups].
        spec: formats and group size.
        order: int64 [rows], the row that comes at each place, or None for their own order.
        columns: int64 [cols], likewise.
    """

    encoded: Encoded
    spec: MatrixSpec
    order: Tensor | None = None
    columns: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        rows, cols = self.encoded.codes.shape
        return rows, cols

    def rows(self) -> Iterator[Tensor]:
        """Indices of some rows at a time, in the order of the export."""
        rows, cols = self.shape
        order = torch.arange(rows) if self.order is None else self.order
        yield from order.split(max(1, CHUNK // cols))

    def levels(self, rows: Tensor) -> tuple[Levels, Units]:
        """Levels int16 [len(rows), cols] and units float16 [len(rows), groups] of these rows.

        Raises:
            InexactError: a unit is no fp16 number.
        """
        try:
            whole = integers(Encoded(self.encoded.codes[rows], self.encoded.scales[rows]), self.spec.take(rows))
        except UnfitError as error:
            raise InexactError(error.reason) from None
        values = whole.values.to(torch.int16)
        if bool((whole.scales == 0).any()):
            values = values * self._columns(whole.scales != 0).to(torch.int16)
        if self.columns is None:
            return values.numpy(), whole.scales.numpy()
        return values[:, self.columns].numpy(), self._columns(whole.scales)[:, self.columns[:: self.group]].numpy()

    def decode(self, rows: Tensor) -> Tensor:
        """The weights of these rows, float32 [len(rows), cols]."""
        encoded = Encoded(self.encoded.codes[rows], self.encoded.scales[rows])
        weights = formats.decode_matrix(encoded, self.spec.take(rows))
        return weights if self.columns is None else weights[:, self.columns]

    @property
    def group(self) -> int:
        """Weights that share a scale; where columns are sorted, those of them that stay together in every group."""
        group = min(self.spec.group_size, self.shape[1])
        if self.columns is None:
            return group
        begins = (self.columns.diff() != 1).nonzero().flatten() + 1
        return math.gcd(group, *begins.tolist(), *self.columns[begins].tolist())

    def _columns(self, of_groups: Tensor) -> Tensor:
        """[rows, groups] repeated for every column of the groups."""
        group = min(self.spec.group_size, self.shape[1])
        return of_groups.repeat_interleave(group, dim=1)[:, : self.shape[1]]


def block_units(levels: Levels, units: Units, group: int, size: int) -> Units:
    """One unit for each block of a row, float16 [rows, blocks].

    A block may lie across groups only where they have the same unit, or codes that are all zero.

    Raises:
        InexactError: rows are not whole blocks, or a block has two units.
    """
    rows, cols = levels.shape
    if cols % size:
        raise InexactError(f"rows of {cols} weights are no multiple of {size}")
    blocks = cols // size
    if group % size == 0:
        return units[:, np.arange(blocks) * size // group]
    of_columns = np.repeat(units, group, axis=1)[:, :cols].reshape(rows, blocks, size)
    used = levels.reshape(rows, blocks, size) != 0
    largest = np.where(used, of_columns, 0).max(axis=2)
    if (used & (of_columns != largest[..., None])).any():
        raise InexactError(f"{size} weights of a block have several scales, of {group} weights each")
    chosen: Units = largest
    return chosen


def checked_rows(block: Block, matrix: BlockMatrix) -> Iterator[tuple[Levels, Units]]:
    """Check and give some rows of a matrix at a time, as levels int16 [blocks, block] and units float16 [blocks].

    Raises:
        InexactError: the type does not hold some weight exactly.
    """
    if matrix.shape[1] % block.size:
        raise InexactError(f"rows of {matrix.shape[1]} weights are no multiple of {block.size}")
    for chosen in matrix.rows():
        levels, units = matrix.levels(chosen)
        if levels.size and (levels.min() < block.lowest or levels.max() > block.highest):
            raise InexactError(
                f"levels of {levels.min()} to {levels.max()} are beyond {block.lowest} to {block.highest}"
            )
        of_blocks = block_units(levels, units, matrix.group, block.size).reshape(-1)
        levels = levels.reshape(-1, block.size)
        block.check(levels)
        yield levels, of_blocks


def check_blocks(block: Block, matrix: BlockMatrix) -> None:
    """Raise InexactError unless a type holds every weight of a matrix exactly."""
    for _ in checked_rows(block, matrix):
        pass


def check_floats(type_: GgmlType, matrix: BlockMatrix) -> None:
    """Raise InexactError unless a floating type holds every weight of a matrix exactly."""
    for chosen in matrix.rows():
        _check_rounding(type_, matrix.decode(chosen))


def write_blocks(block: Block, matrix: BlockMatrix) -> Bytes:
    """A matrix as the blocks of a type: uint8 [rows, bytes of a row].

    Raises:
        InexactError: the type does not hold some weight exactly.
    """
    rows, cols = matrix.shape
    out = np.empty((rows * cols // block.size, int(block.size * block.bits / 8)), dtype=np.uint8)
    start = 0
    for levels, units in checked_rows(block, matrix):
        out[start : start + len(units)] = block.write(levels, units)
        start += len(units)
    return out.reshape(rows, -1)


def write_floats(type_: GgmlType, matrix: BlockMatrix, lossy: bool = False) -> Bytes:
    """A matrix as numbers of 16 or 32 bits: uint8 [rows, bytes of a row].

    Raises:
        InexactError: a weight would be rounded, and `lossy` is false.
    """
    rows, cols = matrix.shape
    out = np.empty((rows, cols * FLOATS[type_].itemsize), dtype=np.uint8)
    start = 0
    for chosen in matrix.rows():
        out[start : start + len(chosen)] = float_bytes(type_, matrix.decode(chosen), lossy)
        start += len(chosen)
    return out


#: GGML's floating types.
FLOATS: dict[GgmlType, torch.dtype] = {
    gguf.GGMLQuantizationType.F16: torch.float16,
    gguf.GGMLQuantizationType.BF16: torch.bfloat16,
    gguf.GGMLQuantizationType.F32: torch.float32,
}


def float_bytes(type_: GgmlType, values: Tensor, lossy: bool = False) -> Bytes:
    """Numbers, any floating dtype [..., n], in a floating type: uint8 [..., n * item size].

    Raises:
        InexactError: one of them would be rounded, and `lossy` is false.
    """
    if not lossy:
        _check_rounding(type_, values)
    octets: Bytes = values.to(FLOATS[type_]).contiguous().view(torch.uint8).numpy()
    return octets


def _check_rounding(type_: GgmlType, values: Tensor) -> None:
    if not torch.equal(values.to(FLOATS[type_]).to(values.dtype), values):
        raise InexactError(f"{type_.name} rounds some of its weights")


# The types, block by block ----------------------------------------------------------------------------------------


def _half(units: Units) -> Bytes:
    """fp16 numbers [blocks] as bytes [blocks, 2]."""
    return np.ascontiguousarray(units).astype("<f2").view(np.uint8).reshape(-1, 2)


#: TQ1_0 cuts 256 trits into 160, 80 and 16, which are 32, 16 and 4 bytes of five, five and four trits.
TRITS = ((0, 160, 5), (160, 240, 5), (240, 256, 4))


def tq1_0(levels: Levels, units: Units) -> Bytes:
    """Trits as fractions of 256: the byte's successive products by 3 carry out one trit each, the first one first."""
    digits = (levels + 1).astype(np.uint16)
    parts = []
    for start, stop, per_byte in TRITS:
        fields = digits[:, start:stop].reshape(len(digits), per_byte, -1)
        powers = np.array([81, 27, 9, 3, 1], dtype=np.uint16)[:per_byte]
        value = (fields * powers[:, None]).sum(axis=1, dtype=np.uint16)
        parts.append(((value * 256 + 242) // 243).astype(np.uint8))
    return np.concatenate([*parts, _half(units)], axis=1)


def _quarters(digits: Levels) -> Bytes:
    """256 numbers of 2 bits in 64 bytes: each half of the block is 32 bytes of four fields, 32 numbers apart."""
    fields = digits.astype(np.uint8).reshape(len(digits), 2, 4, 32)
    shifts = np.array([0, 2, 4, 6], dtype=np.uint8).reshape(1, 1, 4, 1)
    octets: Bytes = np.bitwise_or.reduce(fields << shifts, axis=2).reshape(len(digits), 64)
    return octets


def tq2_0(levels: Levels, units: Units) -> Bytes:
    """Two bits for a trit."""
    return np.concatenate([_quarters(levels + 1), _half(units)], axis=1)


def _check_signs(levels: Levels) -> None:
    """Levels of -2 stand in blocks without 2, whose unit can change its sign.

    Raises:
        InexactError: a block has both.
    """
    if (levels.min(axis=1, initial=0) * levels.max(axis=1, initial=0) == -4).any():
        raise InexactError("a block has levels of -2 and of 2")


def q2_0(levels: Levels, units: Units) -> Bytes:
    """Two bits for a level of -1 to 2 plus one, four of them in a byte; where a block has -2, all signs change."""
    signs = np.where(levels.min(axis=1, initial=0) == -2, -1, 1).astype(np.int16)
    fields = (levels * signs[:, None] + 1).astype(np.uint8).reshape(len(levels), -1, 4)
    octets: Bytes = np.bitwise_or.reduce(fields << np.array([0, 2, 4, 6], dtype=np.uint8), axis=2)
    return np.concatenate([_half(units * signs.astype(np.float16)), octets], axis=1)


def _four(levels: Levels) -> tuple[Levels, Levels, Levels]:
    """Levels as step * digit - offset: digits int16 [blocks, 256] from 0 to 3, steps and offsets int16 [blocks].

    Any four neighbouring levels of which one is 0 or next to it will do, and the odd ones from -3 to 3.
    """
    odd = (np.abs(levels) % 2 == 1).all(axis=1)
    step = np.where(odd, 2, 1).astype(np.int16)
    offset = np.where(odd, 3, np.maximum(0, -levels.min(axis=1))).astype(np.int16)
    digits = (levels + offset[:, None]) // step[:, None]
    if digits.size and (digits.min() < 0 or digits.max() > 3):
        raise InexactError(f"levels of {levels.min()} to {levels.max()} are more than four")
    return digits, step, offset


def q2_k(levels: Levels, units: Units) -> Bytes:
    """d * step * digit - dmin * offset: d and dmin are the unit, and all sub-blocks have the same step and offset."""
    digits, step, offset = _four(levels)
    scales = np.repeat((step | offset << 4).astype(np.uint8)[:, None], 16, axis=1)
    return np.concatenate([scales, _quarters(digits), _half(units), _half(units)], axis=1)


def q3_k(levels: Levels, units: Units) -> Bytes:
    """d * (33 - 32) * level: all sub-scales are 33. The high bit of level + 4 stands in a plane of its own."""
    digits = levels + 4
    fields = (digits >> 2).astype(np.uint8).reshape(len(digits), 8, 32)
    high = np.bitwise_or.reduce(fields << np.arange(8, dtype=np.uint8).reshape(1, 8, 1), axis=1)
    # Of a sub-scale the low four bits stand in a nibble of the first eight bytes, the high two in the last four.
    scales = np.repeat(np.array([[0x11] * 8 + [0xAA] * 4], dtype=np.uint8), len(digits), axis=0)
    return np.concatenate([high, _quarters(digits & 3), scales, _half(units)], axis=1)


def _nibbles(digits: Levels) -> Bytes:
    """32 numbers of 4 bits in 16 bytes: the first half in the low nibbles."""
    fields = digits & 15
    octets: Bytes = (fields[:, :16] | fields[:, 16:] << 4).astype(np.uint8)
    return octets


def q4_0(levels: Levels, units: Units) -> Bytes:
    """A nibble for level + 8."""
    return np.concatenate([_half(units), _nibbles(levels + 8)], axis=1)


def q5_0(levels: Levels, units: Units) -> Bytes:
    """Five bits for level + 16: the fifth ones in four bytes of their own."""
    digits = levels + 16
    high = np.packbits((digits >> 4).astype(np.uint8), axis=1, bitorder="little")
    return np.concatenate([_half(units), high, _nibbles(digits)], axis=1)


def q8_0(levels: Levels, units: Units) -> Bytes:
    """One signed byte for a level."""
    return np.concatenate([_half(units), levels.astype(np.int8).view(np.uint8)], axis=1)


_T = gguf.GGMLQuantizationType
#: From the smallest on.
BLOCKS = (
    Block(_T.TQ1_0, -1, 1, tq1_0),
    Block(_T.TQ2_0, -1, 1, tq2_0),
    Block(NewType.Q2_0, -2, 2, q2_0, _check_signs),
    Block(_T.Q2_K, -3, 3, q2_k, _four),
    Block(_T.Q3_K, -4, 3, q3_k),
    Block(_T.Q4_0, -8, 7, q4_0),
    Block(_T.Q5_0, -16, 15, q5_0),
    Block(_T.Q8_0, -128, 127, q8_0),
)
