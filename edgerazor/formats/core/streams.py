"""Codes and scales as an entropy coder likes them: what is alike lies together, and nothing pads.

The layout that kernels read (`layout.py`) interleaves rows, fills up blocks, and cuts some codes into planes of bits.
An entropy coder of bytes finds none of that useful: planes of one code depend on each other, and filling costs bits. So
what is compressed is

- of codes: digits or runs, as `_code_streams.py` says;
- of scales, row by row: with d the distance of each one's bits (float16, as an integer) to the smallest, first a byte
  `low`, 4, 6 or 8, the smallest in 2 bytes, and the lowest `low` bits of all d, without gaps; then of each d the 8 bits
  above these, in a byte; then likewise those above them. Scales of one matrix differ little: the last are nearly
  always zero, the second have a peak, and the first are noise, or where weights were coarse, not.

Each of these runs of bytes is a *stream*, with statistics of its own. The streams of a part follow one another. Where
there is more than one way to make them, and a way is not known to be the best, there are some to choose from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from edgerazor.formats.core import layout
from edgerazor.formats.core.base import Encoded, group_count
from edgerazor.formats.core.code_streams import EXTRA, code_ways, codes_of
from edgerazor.formats.core.indices import index_columns, pack_indices, unpack_indices
from edgerazor.formats.core.matrix import SCALES, MatrixSpec, encoded_parts

#: How many bits of a scale are low ones: the first where there are more scales than `_SMALL`.
_LOW_BITS = (4, 6, 8)
_SMALL = 1 << 13
_LARGEST_BITS = 0xFFFF
#: Bytes before the low bits of scales.
_BEGIN = 3


class Streams(NamedTuple):
    """A part as streams, uint8 [n] each.

    Attributes:
        ways: lists of streams that hold the same; the smallest, once compressed, is the best.
        codes: how many codes they hold; none where they hold scales.
    """

    ways: list[list[Tensor]]
    codes: int = 0


def to_streams(encoded: Encoded, spec: MatrixSpec) -> dict[str, Streams]:
    """The streams of every part of codes and scales that `pack_matrix` makes.

    Raises:
        ValueError: a code is out of its format's range, or the shapes do not fit together.
    """
    streams = {}
    for part, number_format, _, (codes, scales) in encoded_parts(encoded, spec):
        streams[part] = Streams([[way] for way in code_ways(codes, number_format)], codes.numel())
        few = _LOW_BITS if scales.numel() <= _SMALL else _LOW_BITS[:1]
        streams[part + SCALES] = Streams([_scale_streams(scales, low) for low in few])
    return streams


def stream_bytes(spec: MatrixSpec, shape: tuple[int, int]) -> dict[str, int]:
    """How many bytes the streams of each part of a matrix [rows, cols] have together, at most.

    Raises:
        ValueError: the specification is for another shape.
    """
    sizes = {}
    for strip in spec.strips(shape):
        for number_format, chosen in strip.spec.parts:
            part = number_format.name + strip.suffix
            rows = strip.rows if chosen is None else len(chosen)
            sizes[part] = rows * strip.width + EXTRA
            sizes[part + SCALES] = _BEGIN + 3 * rows * group_count(strip.width, strip.spec.group_size)
    return sizes


def from_streams(streams: Mapping[str, Tensor], spec: MatrixSpec, shape: tuple[int, int]) -> dict[str, Tensor]:
    """The parts of codes and scales, as `pack_matrix` makes them, from the streams of each, uint8 [n].

    Raises:
        ValueError: a part is missing or of a wrong size, or holds what `to_streams` cannot have made; one sentence.
    """
    for part in stream_bytes(spec, shape):
        if part not in streams:
            raise ValueError(f"the part {part} is missing")
    parts = {}
    for strip in spec.strips(shape):
        group_size = strip.spec.group_size
        for number_format, chosen in strip.spec.parts:
            part = number_format.name + strip.suffix
            rows = strip.rows if chosen is None else len(chosen)
            codes = codes_of(streams[part], (rows, strip.width), number_format)
            parts[part] = number_format.pack(codes, group_size)
            scales = _scales(streams[part + SCALES], (rows, group_count(strip.width, group_size)))
            parts[part + SCALES] = layout.pack_scales(scales)
    return parts


def scale_stream_bytes(stream: Tensor, most: int) -> int:
    """How many bytes at the beginning of a stream hold scales, of which there are so many that they take `most`."""
    count = (most - _BEGIN) // 3
    low = int(stream[0]) if stream.numel() else 0
    return _BEGIN + index_columns(count * low, 2) + 2 * count


def _scale_streams(scales: Tensor, low: int) -> list[Tensor]:
    """Scales float16 [rows, groups] in three streams, the first with `low` bits of each."""
    bits = scales.contiguous().view(torch.int16).flatten().int() & _LARGEST_BITS
    smallest = int(bits.min())
    distance = bits - smallest
    single = distance[:, None] >> torch.arange(low) & 1
    begin = torch.tensor([low, smallest & 255, smallest >> 8], dtype=torch.uint8)
    first = torch.cat([begin, pack_indices(single.byte().view(1, -1), 2)[0]])
    return [first, (distance >> low & 255).byte(), (distance >> low + 8).byte()]


def _scales(stream: Tensor, shape: tuple[int, int]) -> Tensor:
    """The inverse of `_scale_streams`: float16 of that shape.

    Raises:
        ValueError: the stream is none of so many scales.
    """
    count = shape[0] * shape[1]
    low = int(stream[0]) if stream.numel() else 0
    columns = index_columns(count * low, 2)
    if low not in _LOW_BITS or stream.numel() != _BEGIN + columns + 2 * count:
        raise ValueError("its scales have another number of bytes")
    begin, first, middle, top = stream.split([_BEGIN, columns, count, count])
    single = unpack_indices(first[None], count * low, 2)[0].view(count, low).int()
    smallest = int(begin[1]) | int(begin[2]) << 8
    distance = (single << torch.arange(low)).sum(1) | middle.int() << low | top.int() << low + 8
    if int(distance.max()) + smallest > _LARGEST_BITS or int(distance.min()) != 0:
        raise ValueError("a scale is out of range")
    return (distance + smallest).short().view(torch.float16).view(shape)
