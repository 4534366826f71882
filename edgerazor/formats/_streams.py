"""Codes and scales as an entropy coder likes them: what is alike lies together, and nothing pads.

The layout that kernels read (`_layout.py`) interleaves rows, fills up blocks, and cuts some codes into planes of bits.
An entropy coder of bytes finds none of that useful: planes of one code depend on each other, and filling costs bits. So
what is compressed is

- of codes: `code - lowest`, row by row, four, two or one to a byte (as many as there is room for in fields of equal
  width), as digits in the base that is the number of codes, the first the lowest; each row begins with a new byte. Such
  a byte has the entropy of its codes, since neighbours tell nothing;
- of scales, row by row: with d the distance of each one's bits (float16, as an integer) to the smallest, first the
  bits 12 to 15 of all d, each in a byte; then bits 4 to 11, likewise; then the smallest itself in 2 bytes and bits 0 to
  3, two to a byte. Scales of one matrix differ little: the first are nearly always zero, the second have a peak, and
  the last are noise.

Each of these runs of bytes is a *stream*, with statistics of its own. The streams of a part follow one another.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from edgerazor.formats import _layout
from edgerazor.formats._base import Encoded, Format, block_rows, group_count
from edgerazor.formats._indices import index_bits, index_columns, pack_indices, unpack_indices
from edgerazor.formats._matrix import SCALES, MatrixSpec, encoded_parts

#: Fields of the low bits of scales: this many values.
_LOW = 16
_LARGEST_BITS = 0xFFFF


def to_streams(encoded: Encoded, spec: MatrixSpec) -> dict[str, list[Tensor]]:
    """The streams, uint8 [n] each, of every part of codes and scales that `pack_matrix` makes.

    Raises:
        ValueError: a code is out of its format's range, or the shapes do not fit together.
    """
    streams = {}
    for part, number_format, _, (codes, scales) in encoded_parts(encoded, spec):
        streams[part] = [_code_stream(codes, number_format)]
        streams[part + SCALES] = _scale_streams(scales)
    return streams


def stream_bytes(spec: MatrixSpec, shape: tuple[int, int]) -> dict[str, int]:
    """How many bytes the streams of each part of a matrix [rows, cols] have together.

    Raises:
        ValueError: the specification is for another shape.
    """
    sizes = {}
    for strip in spec.strips(shape):
        for number_format, chosen in strip.spec.parts:
            part = number_format.name + strip.suffix
            rows = strip.rows if chosen is None else len(chosen)
            scales = rows * group_count(strip.width, strip.spec.group_size)
            sizes[part] = rows * index_columns(strip.width, 1 << number_format.code_bits)
            sizes[part + SCALES] = 2 * scales + 2 + index_columns(scales, _LOW)
    return sizes


def from_streams(streams: Mapping[str, Tensor], spec: MatrixSpec, shape: tuple[int, int]) -> dict[str, Tensor]:
    """The parts of codes and scales, as `pack_matrix` makes them, from the streams of each, uint8 [stream_bytes].

    Raises:
        ValueError: a part is missing or of a wrong size, or holds what `to_streams` cannot have made; one sentence.
    """
    for part, size in stream_bytes(spec, shape).items():
        if part not in streams or streams[part].numel() != size:
            raise ValueError(f"the part {part} must have {size} bytes of streams")
    parts = {}
    for strip in spec.strips(shape):
        group_size = strip.spec.group_size
        for number_format, chosen in strip.spec.parts:
            part = number_format.name + strip.suffix
            rows = strip.rows if chosen is None else len(chosen)
            codes = _codes(streams[part], (rows, strip.width), number_format)
            parts[part] = number_format.pack(codes, group_size)
            scales = _scales(streams[part + SCALES], (rows, group_count(strip.width, group_size)))
            parts[part + SCALES] = _layout.pack_scales(scales)
    return parts


def _code_stream(codes: Tensor, number_format: Format) -> Tensor:
    """Codes int8 [rows, cols] in fields of bytes."""
    number_format.check_codes(codes)
    count = 1 << number_format.code_bits
    stream = torch.empty(len(codes), index_columns(codes.shape[1], count), dtype=torch.uint8)
    height = block_rows(codes)
    for row in range(0, len(codes), height):
        stored = codes[row : row + height].view(torch.uint8) + number_format.offset
        stream[row : row + height] = _take(_digits(count, number_format.levels), pack_indices(stored, count))
    return stream.flatten()


def _codes(stream: Tensor, shape: tuple[int, int], number_format: Format) -> Tensor:
    """The inverse of `_code_stream`; that codes are in range is for the caller to check."""
    count = 1 << number_format.code_bits
    rows = stream.view(shape[0], index_columns(shape[1], count))
    codes = torch.empty(shape, dtype=torch.int8)
    height = block_rows(codes)
    for row in range(0, len(codes), height):
        fields = _take(_digits(count, number_format.levels).argsort().byte(), rows[row : row + height])
        stored = unpack_indices(fields, shape[1], count)
        codes[row : row + height] = (stored - number_format.offset).view(torch.int8)
    return codes


@functools.cache
def _digits(count: int, base: int) -> Tensor:
    """Fields of a byte (indices below `count`) as digits: a permutation uint8 [256] with the possible ones first."""
    bits = index_bits(count)
    fields = torch.arange(256)[:, None] >> torch.arange(0, 8, bits) & (1 << bits) - 1
    values = (fields * base ** torch.arange(8 // bits)).sum(dim=1)
    possible = (fields < base).all(dim=1)
    order = torch.where(possible, values, values + 256 * 256)  # those that no code can make come behind
    return order.argsort(stable=True).argsort().byte()


def _take(table: Tensor, values: Tensor) -> Tensor:
    """`table[values]` of bytes; the identity costs nothing."""
    return values if bool((table == torch.arange(256)).all()) else table[values.int()]


def _scale_streams(scales: Tensor) -> list[Tensor]:
    """Scales float16 [rows, groups] in three streams."""
    bits = scales.contiguous().view(torch.int16).flatten().int() & _LARGEST_BITS
    smallest = int(bits.min())
    distance = bits - smallest
    low = pack_indices((distance & _LOW - 1).byte()[None], _LOW)[0]
    begin = torch.tensor([smallest & 255, smallest >> 8], dtype=torch.uint8)
    return [(distance >> 12).byte(), (distance >> 4 & 255).byte(), torch.cat([begin, low])]


def _scales(stream: Tensor, shape: tuple[int, int]) -> Tensor:
    """The inverse of `_scale_streams`: float16 of that shape."""
    count = shape[0] * shape[1]
    top, middle, begin, low = stream.split([count, count, 2, index_columns(count, _LOW)])
    smallest = int(begin[0]) | int(begin[1]) << 8
    distance = top.int() << 12 | middle.int() << 4 | unpack_indices(low[None], count, _LOW)[0].int()
    if int(top.max()) > 15 or int(distance.max()) + smallest > _LARGEST_BITS or int(distance.min()) != 0:
        raise ValueError("a scale is out of range")
    return (distance + smallest).short().view(torch.float16).view(shape)
