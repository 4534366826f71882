"""One weight matrix, whose rows may have different formats.

Some rows of a matrix matter more than others; a row is the unit in which a model can spend its bits, since a row makes
one output and its products add up in one place. A `MatrixSpec` says which format each row has. With one format for all
rows it says only that.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from edgerazor import registry
from edgerazor.formats._base import Encoded, Format, block_rows, group_count, straight_through

#: Names of the parts of a packed matrix beside those of its formats.
SCALES, ROW_FORMATS = "scales", "row_formats"


@cache
def get(name: str) -> Format:
    """The number format of that name.

    Raises:
        UserError: there is none; the message names the closest ones.
    """
    found: Format = registry.find("formats", name, "FORMAT")
    return found


@dataclass(frozen=True, eq=False)
class MatrixSpec:
    """The formats of a matrix.

    Attributes:
        formats: format names, without repetition.
        group_size: weights of a row that share a scale; a row's length or more means whole rows.
        row_formats: uint8 [rows], an index into `formats` for each row; None when all rows have the one format.
    """

    formats: tuple[str, ...]
    group_size: int
    row_formats: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.formats or len(set(self.formats)) != len(self.formats):
            raise ValueError(f"expected one or more different format names, got {self.formats}")
        if self.group_size < 1:
            raise ValueError(f"the group size must be at least 1, got {self.group_size}")
        if self.row_formats is None:
            if len(self.formats) > 1:
                raise ValueError(f"row formats are needed to choose between {', '.join(self.formats)}")
            return
        if self.row_formats.dtype != torch.uint8 or self.row_formats.dim() != 1:
            raise ValueError("row formats must be a uint8 vector")
        if self.row_formats.numel() and int(self.row_formats.max()) >= len(self.formats):
            raise ValueError(f"a row format index is not below the number of formats, {len(self.formats)}")

    def nominal_bits(self, rows: int) -> float:
        """Mean nominal bits a weight over `rows` rows (of equal length)."""
        self.check_rows(rows)
        bits = [get(name).nominal_bits for name in self.formats]
        if self.row_formats is None or rows == 0:
            return bits[0]
        counts = torch.bincount(self.row_formats.long(), minlength=len(bits)).tolist()
        return sum(count * each for count, each in zip(counts, bits, strict=True)) / rows

    def check_rows(self, rows: int) -> None:
        """ValueError unless the specification is one for a matrix of that many rows."""
        if self.row_formats is not None and len(self.row_formats) != rows:
            raise ValueError(f"there are formats for {len(self.row_formats)} rows, but the matrix has {rows}")

    @cached_property
    def parts(self) -> list[tuple[Format, Tensor | None]]:
        """Each format that some row has, with the indices (int64, ascending) of its rows; None means all rows."""
        if self.row_formats is None:
            return [(get(self.formats[0]), None)]
        found = [(name, (self.row_formats == i).nonzero().flatten()) for i, name in enumerate(self.formats)]
        return [(get(name), rows) for name, rows in found if len(rows)]

    def take(self, rows: Tensor) -> MatrixSpec:
        """The specification of the matrix made of these rows (int64 indices, any order, repetition allowed)."""
        if self.row_formats is None:
            return self
        return MatrixSpec(self.formats, self.group_size, self.row_formats[rows.to(self.row_formats.device)])


def encode_matrix(w: Tensor, spec: MatrixSpec, scales: Tensor | None = None) -> Encoded:
    """Codes int8 [rows, cols] and scales float16 [rows, groups], in the matrix's own row order, of w [rows, cols].

    Args:
        w: any floating dtype [rows, cols].
        spec: formats of the rows.
        scales: use these, [rows, groups], instead of the formats' rules (see `Format.encode`).

    Raises:
        ValueError: as `Format.encode`, or the specification is for another number of rows.
    """
    spec.check_rows(w.shape[0])
    encoded = [
        (part.encode(_select(w.detach(), rows), spec.group_size, given), rows)
        for part, rows, given in _with_scales(spec, scales)
    ]
    codes = _merge([(each.codes, rows) for each, rows in encoded], (*w.shape,), torch.int8, w.device)
    groups = group_count(w.shape[1], spec.group_size)
    stored = _merge([(each.scales, rows) for each, rows in encoded], (w.shape[0], groups), torch.float16, w.device)
    return Encoded(codes, stored)


def _with_scales(spec: MatrixSpec, scales: Tensor | None) -> Iterator[tuple[Format, Tensor | None, Tensor | None]]:
    """Each format, its rows, and their share of the given scales [rows, groups]."""
    for number_format, rows in spec.parts:
        yield number_format, rows, None if scales is None else _select(scales, rows)


def decode_matrix(encoded: Encoded, spec: MatrixSpec) -> Tensor:
    """The weights, float32 [rows, cols], that an encoded matrix stands for.

    Raises:
        ValueError: the shapes do not fit together.
    """
    codes, scales = encoded
    spec.check_rows(codes.shape[0])
    decoded = [
        (part.decode(_select(codes, rows), _select(scales, rows), spec.group_size), rows) for part, rows in spec.parts
    ]
    return _merge(decoded, (*codes.shape,), torch.float32, codes.device)


def fake_quantize_matrix(w: Tensor, spec: MatrixSpec) -> Tensor:
    """`decode_matrix(encode_matrix(w))`, float32 [rows, cols], for training: the gradient passes to `w` unchanged.

    Raises:
        ValueError: as `encode_matrix`.
    """
    spec.check_rows(w.shape[0])

    return straight_through(w, lambda w: round_trip(w, spec))


def round_trip(w: Tensor, spec: MatrixSpec, dtype: torch.dtype = torch.float32, scales: Tensor | None = None) -> Tensor:
    """`decode_matrix(encode_matrix(w, scales))` [rows, cols] without gradient, never whole but in `dtype`.

    Raises:
        ValueError: as `encode_matrix`.
    """
    spec.check_rows(w.shape[0])
    if spec.row_formats is None:
        return spec.parts[0][0].round_trip(w, spec.group_size, dtype, scales)
    rounded = torch.empty(w.shape, dtype=dtype, device=w.device)
    for number_format, rows in spec.parts:
        assert rows is not None
        for block in rows.to(w.device).split(block_rows(w)):  # gathered, rounded and put back while in the cache
            given = None if scales is None else scales.index_select(0, block)
            part = number_format.round_trip(w.index_select(0, block), spec.group_size, dtype, given)
            rounded.index_copy_(0, block, part)
    return rounded


def _select(matrix: Tensor, rows: Tensor | None) -> Tensor:
    """These rows of the matrix; all of them where `rows` is None."""
    return matrix if rows is None else matrix.index_select(0, rows.to(matrix.device))


def _merge(
    parts: list[tuple[Tensor, Tensor | None]], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """One matrix of that shape from (its rows, their indices); a part without indices is the whole matrix."""
    if len(parts) == 1 and parts[0][1] is None:
        return parts[0][0]
    merged = torch.empty(shape, dtype=dtype, device=device)
    for values, rows in parts:
        assert rows is not None
        merged.index_copy_(0, rows.to(device), values)
    return merged


def digest(encoded: Encoded, spec: MatrixSpec) -> str:
    """SHA-256 (hexadecimal) of everything that decides the decoded weights.

    It covers the shape, the group size, the format of each row, the codes and the scales; it does not depend on
    device, memory layout, or on how the specification is written down (order of formats, formats without rows).
    """
    codes, scales = encoded
    spec.check_rows(codes.shape[0])
    used = sorted(number_format.name for number_format, _ in spec.parts)
    row_formats = torch.zeros(codes.shape[0], dtype=torch.uint8)
    for number_format, rows in spec.parts:
        row_formats[slice(None) if rows is None else rows.cpu()] = used.index(number_format.name)
    about = {"shape": list(codes.shape), "group_size": min(spec.group_size, codes.shape[1]), "formats": used}
    sha = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for tensor in (row_formats, codes, scales):
        sha.update(tensor_bytes(tensor))
    return sha.hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major, little-endian order, wherever and however it is stored."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")


def pack_matrix(encoded: Encoded, spec: MatrixSpec) -> dict[str, Tensor]:
    """The parts of a matrix as they are stored.

    Returns:
        `{format name: uint8 [its rows, packed columns]}` with the rows of each format that some row has, in row order;
        `"scales"`: float16 [rows, groups] in the matrix's row order; `"row_formats"`: uint8 [rows] if rows may differ.

    Raises:
        ValueError: a code is out of its format's range, or the shapes do not fit together.
    """
    codes, scales = encoded
    spec.check_rows(codes.shape[0])
    parts = {}
    for number_format, rows in spec.parts:
        parts[number_format.name] = number_format.pack(_select(codes, rows))
    parts[SCALES] = scales.contiguous()
    if spec.row_formats is not None:
        parts[ROW_FORMATS] = spec.row_formats.contiguous()
    return parts


def unpack_matrix(
    parts: Mapping[str, Tensor], formats: Sequence[str], group_size: int, shape: tuple[int, int]
) -> tuple[Encoded, MatrixSpec]:
    """The inverse of `pack_matrix`, trusting nothing.

    Args:
        parts: what `pack_matrix` returned, perhaps damaged.
        formats: names of the formats, in the order that `row_formats` counts them.
        group_size: weights of a row that share a scale.
        shape: (rows, cols) of the matrix.

    Raises:
        ValueError: a part is missing, unknown, of a wrong shape or dtype, or holds a value that `pack_matrix` cannot
            have written; one sentence.
    """
    rows, cols = shape
    row_formats = _checked_part(parts, ROW_FORMATS, torch.uint8, (rows,)) if ROW_FORMATS in parts else None
    spec = MatrixSpec(tuple(formats), group_size, row_formats)
    scales = _checked_part(parts, SCALES, torch.float16, (rows, group_count(cols, group_size)))
    if not torch.isfinite(scales).all() or torch.signbit(scales).any():
        raise ValueError("a scale is negative or not finite")
    extra = set(parts) - {part[0].name for part in spec.parts} - {SCALES, ROW_FORMATS}
    if extra:
        raise ValueError(f"the part {min(extra)} does not belong to it")
    unpacked = []
    for number_format, chosen in spec.parts:
        count = rows if chosen is None else len(chosen)
        packed = _checked_part(parts, number_format.name, torch.uint8, (count, number_format.packed_columns(cols)))
        unpacked.append((number_format.unpack(packed, cols), chosen))
    return Encoded(_merge(unpacked, shape, torch.int8, scales.device), scales), spec


def _checked_part(parts: Mapping[str, Tensor], name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if name not in parts:
        raise ValueError(f"the part {name} is missing")
    part = parts[name]
    if part.dtype != dtype or tuple(part.shape) != shape:
        raise ValueError(f"the part {name} must be {dtype} {list(shape)}, got {part.dtype} {list(part.shape)}")
    return part
