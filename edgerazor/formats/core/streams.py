"""Codes and scales as byte streams that an entropy coder compresses well: like stands with like, without padding.

The layout that kernels read (`layout.py`) interleaves rows, pads blocks, and cuts some codes into bit planes. That does
not suit an entropy coder of bytes: the planes of one code depend on each other, and padding costs bits. So what is
compressed is

- of codes: digits or runs, as `code_streams.py` says;
- of scales, row by row, with d the distance of the bits of each one (float16, read as an integer) to the smallest:
  first a byte `low`, 4, 6 or 8, the smallest in 2 bytes, and the lowest `low` bits of all d, without gaps; then the 8
  bits above these of each d, a byte each; then likewise the bits above those. Scales of one matrix differ little: the
  last are nearly always zero, the second have a peak, and the first are noise, or, where weights were coarse, not.

Each of these runs of bytes is a *stream*, with statistics of its own. The streams of a part follow one another. Where
there are several ways to make them, and none is known to be the best, there are several candidates to choose from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from edgerazor.formats.core import layout
from edgerazor.formats.core.base import Encoded, group_count
from edgerazor.formats.core.code_streams import EXTRA, code_stream_candidates, codes_from_stream
from edgerazor.formats.core.indices import index_row_bytes, pack_indices, unpack_indices
from edgerazor.formats.core.matrix import SCALES, MatrixSpec, encoded_parts

#: How many bits of a scale may count as low ones; the first where there are more scales than `_SMALL`.
_LOW_BITS = (4, 6, 8)
_SMALL = 1 << 13
_LARGEST_BITS = 0xFFFF
#: Bytes before the low bits of scales: how many bits are low, and the smallest scale.
_PREFIX_BYTES = 3


class Streams(NamedTuple):
    """A part as streams, uint8 [n] each.

    Attributes:
        candidates: lists of streams, each of which holds the whole part; the one that compresses best is stored.
        codes: number of codes that they hold; 0 where they hold scales.
    """

    candidates: list[list[Tensor]]
    codes: int = 0


def to_streams(encoded: Encoded, spec: MatrixSpec) -> dict[str, Streams]:
    """The streams of every part of codes and scales that `pack_matrix` makes.

    Raises:
        ValueError: a code is out of its format's range, or the shapes do not fit together.
    """
    streams = {}
    for part, number_format, _, (codes, scales) in encoded_parts(encoded, spec):
        streams[part] = Streams([[stream] for stream in code_stream_candidates(codes, number_format)], codes.numel())
        low_bits = _LOW_BITS if scales.numel() <= _SMALL else _LOW_BITS[:1]
        streams[part + SCALES] = Streams([_scale_streams(scales, low) for low in low_bits])
    return streams


def stream_bytes(spec: MatrixSpec, shape: tuple[int, int]) -> dict[str, int]:
    """The most bytes that the streams of each part of a matrix [rows, cols] can have together.

    Raises:
        ValueError: the specification is for another shape.
    """
    sizes = {}
    for view in spec.block_views(shape):
        for number_format, indices in view.spec.format_rows:
            part = number_format.name + view.suffix
            rows = view.rows if indices is None else len(indices)
            sizes[part] = rows * view.width + EXTRA
            sizes[part + SCALES] = _PREFIX_BYTES + 3 * rows * group_count(view.width, view.spec.group_size)
    return sizes


def from_streams(streams: Mapping[str, Tensor], spec: MatrixSpec, shape: tuple[int, int]) -> dict[str, Tensor]:
    """The parts of codes and scales, as `pack_matrix` makes them, from the streams of each, uint8 [n].

    Raises:
        ValueError: a part is missing, has a wrong size, or holds what `to_streams` cannot have made; one sentence.
    """
    for part in stream_bytes(spec, shape):
        if part not in streams:
            raise ValueError(f"the part {part} is missing")
    parts = {}
    for view in spec.block_views(shape):
        group_size = view.spec.group_size
        for number_format, indices in view.spec.format_rows:
            part = number_format.name + view.suffix
            rows = view.rows if indices is None else len(indices)
            codes = codes_from_stream(streams[part], (rows, view.width), number_format)
            parts[part] = number_format.pack(codes, group_size)
            scales = _scales_from_stream(streams[part + SCALES], (rows, group_count(view.width, group_size)))
            parts[part + SCALES] = layout.pack_scales(scales)
    return parts


def scale_stream_bytes(stream: Tensor, most: int) -> int:
    """Bytes at the beginning of a stream that hold scales; `most` is what `stream_bytes` says of them."""
    count = (most - _PREFIX_BYTES) // 3
    low = int(stream[0]) if stream.numel() else 0
    return _PREFIX_BYTES + index_row_bytes(count * low, 2) + 2 * count


def _scale_streams(scales: Tensor, low: int) -> list[Tensor]:
    """Scales float16 [rows, groups] as three streams, the first with `low` bits of each."""
    bits = scales.contiguous().view(torch.int16).flatten().int() & _LARGEST_BITS
    smallest = int(bits.min())
    distance = bits - smallest
    low_bits = distance[:, None] >> torch.arange(low) & 1
    prefix = torch.tensor([low, smallest & 255, smallest >> 8], dtype=torch.uint8)
    first = torch.cat([prefix, pack_indices(low_bits.byte().view(1, -1), 2)[0]])
    return [first, (distance >> low & 255).byte(), (distance >> low + 8).byte()]


def _scales_from_stream(stream: Tensor, shape: tuple[int, int]) -> Tensor:
    """The inverse of `_scale_streams`: float16 of that shape.

    Raises:
        ValueError: the stream cannot hold so many scales.
    """
    count = shape[0] * shape[1]
    low = int(stream[0]) if stream.numel() else 0
    low_bytes = index_row_bytes(count * low, 2)
    if low not in _LOW_BITS or stream.numel() != _PREFIX_BYTES + low_bytes + 2 * count:
        raise ValueError("its scales have another number of bytes")
    prefix, first, middle, top = stream.split([_PREFIX_BYTES, low_bytes, count, count])
    low_bits = unpack_indices(first[None], count * low, 2)[0].view(count, low).int()
    smallest = int(prefix[1]) | int(prefix[2]) << 8
    distance = (low_bits << torch.arange(low)).sum(1) | middle.int() << low | top.int() << low + 8
    if int(distance.max()) + smallest > _LARGEST_BITS or int(distance.min()) != 0:
        raise ValueError("a scale is out of range")
    return (distance + smallest).short().view(torch.float16).view(shape)
