"""Where codes and scales lie in memory: for vector units, which read them as they are.

A product `y = W x` of small integers is fastest where one instruction multiplies the weights of many rows by the same
few activations: then no sum runs across a register, and an activation is loaded once. So the codes of 16 rows are
interleaved. Four consecutive columns of a row are a *quad*, the four products that an instruction such as `vpdpbusd`
or `sdot` adds to one 32-bit lane. A *vector* is 64 bytes: byte `4 * lane + j` belongs to row `lane` of 16 and to
column j of a quad. Codes are narrower than bytes, and the fields of a byte belong to different quads, so that a mask
(or a table, for base 3) turns one vector into the operands of several instructions.

Each format decides how quads share vectors (`Format.pack_quads`); this file has the parts that formats share. Codes are
stored as unsigned numbers, `code - min_code`, since one operand of those instructions is unsigned. Each group begins
with a new quad. Padding (of rows to 16, of groups to quads, of quads to vectors) is code 0, so its products vanish, and
a file has no place to hide anything.

The functions work on eight bytes at a time, as one 64-bit integer whose bytes never carry into each other.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Rows of a block, columns of a quad, bytes of a vector.
ROWS, QUAD, VECTOR = 16, 4, 64
WORDS = VECTOR // 8

_ONES = 0x0101010101010101


def repeat_byte(value: int) -> int:
    """A 64-bit integer (signed, as those of torch are) whose eight bytes are all `value`, 0 to 255."""
    word = _ONES * value
    return word - (1 << 64) if word >= 1 << 63 else word


def row_blocks(rows: int) -> int:
    """Number of row blocks, 16 rows each, that hold `rows` rows."""
    return -(-rows // ROWS)


def quad_count(cols: int, group_size: int) -> int:
    """Quads of a row of `cols` columns, of which each `group_size` begin with a new one."""
    group = min(group_size, cols)
    return cols // group * -(-group // QUAD) + -(-(cols % group) // QUAD)


def to_quads(bytes_: Tensor, group_size: int, fill: int) -> Tensor:
    """Interleave uint8 [rows, cols] into words int64 [row blocks, quads, 8]; padding is the byte `fill`."""
    rows, cols = bytes_.shape
    group = min(group_size, cols)
    if group % QUAD:
        whole = cols - cols % group
        groups = bytes_[:, :whole].unflatten(1, (-1, group))
        bytes_ = torch.cat([_padded(groups, QUAD, fill).flatten(1), _padded(bytes_[:, whole:], QUAD, fill)], dim=1)
    else:
        bytes_ = _padded(bytes_, QUAD, fill)
    if rows % ROWS:
        bytes_ = torch.nn.functional.pad(bytes_, (0, 0, 0, -rows % ROWS), value=fill)
    lanes = bytes_.contiguous().view(torch.int32).unflatten(0, (-1, ROWS))  # [row blocks, 16, quads]
    blocks, _, quads = lanes.shape
    return lanes.transpose(1, 2).reshape(-1).view(torch.int64).view(blocks, quads, WORDS)


def from_quads(words: Tensor, shape: tuple[int, int], group_size: int, fill: int) -> Tensor:
    """The inverse of `to_quads`: uint8 [rows, cols].

    Raises:
        ValueError: padding is not `fill`.
    """
    rows, cols = shape
    group = min(group_size, cols)
    lanes = words.reshape(-1).view(torch.int32).view(*words.shape[:2], ROWS).transpose(1, 2)
    bytes_ = lanes.reshape(-1).view(torch.uint8).view(len(words) * ROWS, -1)
    padding = [bytes_[rows:]]
    bytes_ = bytes_[:rows]
    if group % QUAD:
        whole = cols // group
        width = -(-group // QUAD) * QUAD
        groups, tail = bytes_[:, : whole * width].unflatten(1, (-1, width)), bytes_[:, whole * width :]
        padding += [groups[..., group:], tail[:, cols % group :]]
        bytes_ = torch.cat([groups[..., :group].flatten(1), tail[:, : cols % group]], dim=1)
    else:
        padding.append(bytes_[:, cols:])
        bytes_ = bytes_[:, :cols]
    if any(bool((codes != fill).any()) for codes in padding):
        raise ValueError("a code that only fills up a row, a group or a block of rows is not zero")
    return bytes_.contiguous()


def _padded(matrix: Tensor, multiple: int, fill: int) -> Tensor:
    """The matrix with its last dimension padded to a multiple."""
    missing = -matrix.shape[-1] % multiple
    return torch.nn.functional.pad(matrix, (0, missing), value=fill) if missing else matrix


# Bit planes -------------------------------------------------------------------------------------------------------


def bit_plane_widths(bits: int) -> list[int]:
    """Widths of the bit planes that codes of 1 to 8 bits are cut into, their low bits first: powers of two."""
    return [8] if bits == 8 else [width for width in (4, 2, 1) if bits & width]


def bit_plane_vectors(quads: int, width: int) -> int:
    """Vectors of 64 bytes that the bit plane of one width takes for `quads` quads."""
    return -(-quads * width // 8)


def pack_bit_plane(words: Tensor, shift: int, width: int, fill: int) -> Tensor:
    """Bits `shift` to `shift + width - 1` of each byte: words [..., quads, 8] as vectors [..., n, 8].

    There are n = `bit_plane_vectors(quads, width)` vectors.
    Vector v holds quad `v * 8 / width + f` in field f of its bytes, low bits first; `fill` is the byte of padding.
    """
    if width == 8:
        return words
    fields = words >> shift & repeat_byte((1 << width) - 1)
    count = 8 // width
    if missing := -fields.shape[-2] % count:
        padding = fields.new_full((*fields.shape[:-2], missing, WORDS), repeat_byte(fill >> shift & ((1 << width) - 1)))
        fields = torch.cat([fields, padding], dim=-2)
    fields = fields.unflatten(-2, (-1, count))
    packed = fields[..., 0, :].clone()
    for f in range(1, count):
        packed |= fields[..., f, :] << (f * width)
    return packed


def unpack_bit_plane(packed: Tensor, quads: int, width: int, fill: int) -> Tensor:
    """The inverse of `pack_bit_plane` but for the shift: vectors [..., n, 8] as words [..., quads, 8].

    `fill` is the value of a field of padding.

    Raises:
        ValueError: a field of padding is not `fill`.
    """
    if width == 8:
        return packed
    mask = repeat_byte((1 << width) - 1)
    fields = torch.stack([packed >> (f * width) & mask for f in range(8 // width)], dim=-2).flatten(-3, -2)
    if bool((fields[..., quads:, :] != repeat_byte(fill)).any()):
        raise ValueError("a code that only fills up a vector is not zero")
    return fields[..., :quads, :]


# Scales -----------------------------------------------------------------------------------------------------------


def pack_scales(scales: Tensor) -> Tensor:
    """Scales [rows, groups] interleaved as [row blocks, groups, 16], zero where there is no row."""
    rows = scales.shape[0]
    if rows % ROWS:
        scales = torch.nn.functional.pad(scales, (0, 0, 0, -rows % ROWS))
    return scales.unflatten(0, (-1, ROWS)).transpose(1, 2).contiguous()


def unpack_scales(packed: Tensor, rows: int) -> Tensor:
    """The inverse of `pack_scales`: [rows, groups].

    Raises:
        ValueError: the scale of a row that is not there is not zero.
    """
    scales = packed.transpose(1, 2).flatten(0, 1)
    if bool((scales[rows:].view(torch.int16) != 0).any()):
        raise ValueError("a scale that only fills up a block of rows is not zero")
    return scales[:rows].contiguous()
