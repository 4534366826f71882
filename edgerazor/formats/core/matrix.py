"""One weight matrix, whose rows or blocks may have different formats.

Some rows of a matrix matter more than others; a row is the unit in which a model can spend its bits, since a row makes
one output and its products add up in one place. A `MatrixSpec` says which format each row has. With one format for all
rows it says only that.

A *block* is a group of one row, the smallest unit that can have a format: it has a scale of its own already. Formats of
blocks need no second way to do anything. The columns that whole groups fill, read group by group, are a matrix whose
rows are blocks; a shorter last group of every row is another one. Such a matrix is a `BlockView`, and everything below
does to a matrix of blocks what it does to its one or two views.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from edgerazor import registry
from edgerazor.formats.core import layout
from edgerazor.formats.core.base import Encoded, Format, block_rows, group_count, straight_through
from edgerazor.formats.core.indices import index_columns, pack_indices, unpack_indices

#: Names of the parts of a packed matrix beside those of its formats.
ROW_FORMATS, BLOCK_FORMATS = "row_formats", "block_formats"
#: End of the name of the part that holds the scales of another.
SCALES = ".scales"
#: End of the name of the part that holds a format's shorter last groups, where blocks have formats.
TAIL = ".tail"


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
        row_formats: uint8 [rows], an index into `formats` for each row.
        block_formats: uint8 [rows, groups], one for each group of each row, or [1, groups] when all rows are alike.
            One of the two; neither when the whole matrix has the one format.
        published: scales follow from the formats' published rules, not from a search for the least squared error.
            Says how to encode, and nothing of what is stored.
    """

    formats: tuple[str, ...]
    group_size: int
    row_formats: Tensor | None = None
    block_formats: Tensor | None = None
    published: bool = False

    def __post_init__(self) -> None:
        if not self.formats or len(set(self.formats)) != len(self.formats):
            raise ValueError(f"expected one or more different format names, got {self.formats}")
        if self.group_size < 1:
            raise ValueError(f"the group size must be at least 1, got {self.group_size}")
        if self.row_formats is not None and self.block_formats is not None:
            raise ValueError("either rows or blocks have formats, not both")
        unit = "row" if self.block_formats is None else "block"
        indices = self.row_formats if self.block_formats is None else self.block_formats
        if indices is None:
            if len(self.formats) > 1:
                raise ValueError(f"row formats are needed to choose between {', '.join(self.formats)}")
            return
        if indices.dtype != torch.uint8 or indices.dim() != (1 if unit == "row" else 2):
            raise ValueError(f"{unit} formats must be a uint8 {'vector' if unit == 'row' else 'matrix'}")
        if indices.numel() and int(indices.max()) >= len(self.formats):
            raise ValueError(f"a {unit} format index is not below the number of formats, {len(self.formats)}")

    def weights_by_format(self, shape: tuple[int, int]) -> dict[str, int]:
        """How many weights of a matrix [rows, cols] have each format, those that have none left out."""
        counts = dict.fromkeys(self.formats, 0)
        for strip in self.strips(shape):
            for number_format, rows in strip.spec.parts:
                counts[number_format.name] += strip.width * (strip.rows if rows is None else len(rows))
        return {name: count for name, count in counts.items() if count}

    def nominal_bits(self, shape: tuple[int, int]) -> float:
        """Mean nominal bits a weight of a matrix [rows, cols]."""
        counts = self.weights_by_format(shape)
        total = sum(counts.values())
        if not total:
            return get(self.formats[0]).nominal_bits
        return sum(get(name).nominal_bits * count for name, count in counts.items()) / total

    def packed_bytes(self, shape: tuple[int, int]) -> int:
        """Bytes of all that is stored of a matrix [rows, cols]."""
        return sum(math.prod(size) for size in stored_shapes(self, shape).values())

    def check_shape(self, shape: Sequence[int]) -> None:
        """ValueError unless the specification is one for a matrix of that shape [rows, cols]."""
        if self.row_formats is not None and len(self.row_formats) != shape[0]:
            raise ValueError(f"there are formats for {len(self.row_formats)} rows, but the matrix has {shape[0]}")
        if self.block_formats is not None:
            expected = (shape[0], group_count(shape[1], self.group_size))
            found = tuple(self.block_formats.shape)
            if found not in (expected, (1, expected[1])):
                raise ValueError(f"there are formats for {list(found)} blocks, but the matrix has {list(expected)}")

    def strips(self, shape: Sequence[int]) -> list[BlockView]:
        """The matrix [rows, cols] as matrices whose rows have formats: itself, or its blocks.

        Raises:
            ValueError: the specification is for another shape.
        """
        self.check_shape(shape)
        rows, cols = shape
        if self.block_formats is None:
            return [BlockView(slice(0, cols), slice(0, group_count(cols, self.group_size)), 1, rows, cols, self, "")]
        if (rows, cols) not in self._strips:
            self._strips.clear()
            self._strips[rows, cols] = list(self._cut(self.block_formats, rows, cols))
        return self._strips[rows, cols]

    def _cut(self, block_formats: Tensor, rows: int, cols: int) -> Iterator[BlockView]:
        group = min(self.group_size, cols)
        whole = cols // group
        every = block_formats.expand(rows, -1)
        ends = [(0, whole, group, "")]
        if cols % group:
            ends.append((whole, whole + 1, cols % group, TAIL))
        for start, stop, width, suffix in ends:
            spec = replace(self, group_size=width, row_formats=every[:, start:stop].reshape(-1), block_formats=None)
            columns = slice(start * group, start * group + (stop - start) * width)
            yield BlockView(columns, slice(start, stop), stop - start, rows * (stop - start), width, spec, suffix)

    @cached_property
    def _strips(self) -> dict[tuple[int, int], list[BlockView]]:
        """Of the last shape asked for: in training it is always the same."""
        return {}

    @cached_property
    def parts(self) -> list[tuple[Format, Tensor | None]]:
        """Each format that some row has, with the indices (int64, ascending) of its rows; None means all rows.

        Blocks have no rows of one format: ask for those of the `strips`.
        """
        if self.block_formats is not None:
            raise ValueError("the format changes within a row")
        if self.row_formats is None:
            return [(get(self.formats[0]), None)]
        found = [(name, (self.row_formats == i).nonzero().flatten()) for i, name in enumerate(self.formats)]
        return [(get(name), rows) for name, rows in found if len(rows)]

    def take(self, rows: Tensor) -> MatrixSpec:
        """The specification of the matrix made of these rows (int64 indices, any order, repetition allowed)."""
        if self.row_formats is not None:
            return replace(self, row_formats=self.row_formats[rows.to(self.row_formats.device)])
        if self.block_formats is None or len(self.block_formats) == 1:
            return self
        return replace(self, block_formats=self.block_formats[rows.to(self.block_formats.device)])


class BlockView(NamedTuple):
    """Some columns of a matrix, read as a matrix [rows, width] whose rows have formats.

    Attributes:
        columns, groups: which columns of the whole matrix, and which groups of its rows.
        blocks: rows of the strip that come from one row of the matrix.
        rows, width: shape of the strip.
        spec: formats of its rows.
        suffix: of the names of its packed parts.
    """

    columns: slice
    groups: slice
    blocks: int
    rows: int
    width: int
    spec: MatrixSpec
    suffix: str

    def of(self, matrix: Tensor) -> Tensor:
        """The strip of a matrix [rows, cols]; a view where it can be."""
        return matrix[:, self.columns].reshape(self.rows, self.width)

    def encoded(self, encoded: Encoded) -> Encoded:
        """The strip of an encoded matrix."""
        return Encoded(self.of(encoded.codes), self.scales_of(encoded.scales))

    def scales_of(self, scales: Tensor) -> Tensor:
        """The scales of the strip, from those of the whole matrix [rows, groups]."""
        return scales[:, self.groups].reshape(self.rows, group_count(self.width, self.spec.group_size))


def encode_matrix(w: Tensor, spec: MatrixSpec, scales: Tensor | None = None) -> Encoded:
    """Codes int8 [rows, cols] and scales float16 [rows, groups], in the matrix's own row order, of w [rows, cols].

    Args:
        w: any floating dtype [rows, cols].
        spec: formats of the rows.
        scales: use these, [rows, groups], instead of those that the specification asks for (see `Format.encode`).

    Raises:
        ValueError: as `Format.encode`, or the specification is for another number of rows.
    """
    if spec.block_formats is not None:
        strips = spec.strips(w.shape)
        parts = [
            encode_matrix(strip.of(w.detach()), strip.spec, None if scales is None else strip.scales_of(scales))
            for strip in strips
        ]
        return Encoded(
            join_strips(strips, [each.codes for each in parts]), join_strips(strips, [each.scales for each in parts])
        )
    spec.check_shape(w.shape)
    w = w.detach()
    if spec.row_formats is None:
        return spec.parts[0][0].encode(w, spec.group_size, scales, spec.published)
    codes = torch.empty(w.shape, dtype=torch.int8, device=w.device)
    stored = torch.empty(w.shape[0], group_count(w.shape[1], spec.group_size), dtype=torch.float16, device=w.device)
    for number_format, rows in spec.parts:
        assert rows is not None
        for block in rows.to(w.device).split(block_rows(w)):  # gathered, encoded and put back while in the cache
            given = None if scales is None else scales.index_select(0, block)
            part = number_format.encode(w.index_select(0, block), spec.group_size, given, spec.published)
            codes.index_copy_(0, block, part.codes)
            stored.index_copy_(0, block, part.scales)
    return Encoded(codes, stored)


def decode_matrix(encoded: Encoded, spec: MatrixSpec) -> Tensor:
    """The weights, float32 [rows, cols], that an encoded matrix stands for.

    Raises:
        ValueError: the shapes do not fit together.
    """
    codes, scales = encoded
    if spec.block_formats is not None:
        strips = spec.strips(codes.shape)
        parts = [decode_matrix(strip.encoded(encoded), strip.spec) for strip in strips]
        return join_strips(strips, parts)
    spec.check_shape(codes.shape)
    decoded = [
        (part.decode(_select(codes, rows), _select(scales, rows), spec.group_size), rows) for part, rows in spec.parts
    ]
    return _merge(decoded, (*codes.shape,), torch.float32, codes.device)


def fake_quantize_matrix(w: Tensor, spec: MatrixSpec) -> Tensor:
    """`decode_matrix(encode_matrix(w))`, float32 [rows, cols], for training: the gradient passes to `w` unchanged.

    Raises:
        ValueError: as `encode_matrix`.
    """
    spec.check_shape(w.shape)
    return straight_through(w, lambda w: quantize_dequantize(w, spec))


def quantize_dequantize(
    w: Tensor, spec: MatrixSpec, dtype: torch.dtype = torch.float32, scales: Tensor | None = None
) -> Tensor:
    """`decode_matrix(encode_matrix(w, scales))` [rows, cols] without gradient, never whole but in `dtype`.

    Raises:
        ValueError: as `encode_matrix`.
    """
    if spec.block_formats is not None:
        strips = spec.strips(w.shape)
        parts = [(strip, None if scales is None else strip.scales_of(scales)) for strip in strips]
        return join_strips(
            strips, [quantize_dequantize(strip.of(w), strip.spec, dtype, given) for strip, given in parts]
        )
    spec.check_shape(w.shape)
    if spec.row_formats is None:
        return spec.parts[0][0].quantize_dequantize(w, spec.group_size, dtype, scales, spec.published)
    rounded = torch.empty(w.shape, dtype=dtype, device=w.device)
    for number_format, rows in spec.parts:
        assert rows is not None
        for block in rows.to(w.device).split(block_rows(w)):  # gathered, rounded and put back while in the cache
            given = None if scales is None else scales.index_select(0, block)
            part = number_format.quantize_dequantize(
                w.index_select(0, block), spec.group_size, dtype, given, spec.published
            )
            rounded.index_copy_(0, block, part)
    return rounded


def join_strips(strips: list[BlockView], parts: list[Tensor]) -> Tensor:
    """The whole matrix from its strips, or from something else of them, [rows of the strip, n]."""
    merged = [
        part.reshape(strip.rows // strip.blocks, strip.blocks * part.shape[1])
        for strip, part in zip(strips, parts, strict=True)
    ]
    return merged[0] if len(merged) == 1 else torch.cat(merged, dim=1)


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

    It covers the shape, the group size, the format of each row or block, the codes and the scales; it does not depend
    on device, memory layout, or on how the specification is written down (order of formats, formats that nothing has,
    formats of blocks that are the same all along each row).
    """
    codes, scales = encoded
    used, indices = _plainest(spec, codes.shape)
    about = {"shape": list(codes.shape), "group_size": min(spec.group_size, codes.shape[1]), "formats": used}
    if indices.dim() == 2:
        about["unit"] = "block"
    sha = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for tensor in (indices, codes, scales):
        sha.update(tensor_bytes(tensor))
    return sha.hexdigest()


def _plainest(spec: MatrixSpec, shape: torch.Size) -> tuple[list[str], Tensor]:
    """The formats in use, sorted, and an index into them as uint8 [rows], or [rows, groups] where that is needed."""
    used = sorted({number_format.name for strip in spec.strips(shape) for number_format, _ in strip.spec.parts})
    lookup = torch.tensor([used.index(name) if name in used else 0 for name in spec.formats], dtype=torch.uint8)
    if spec.block_formats is None:
        rows = torch.zeros(shape[0], dtype=torch.uint8) if spec.row_formats is None else spec.row_formats.cpu()
        return used, lookup[rows.long()]
    blocks = lookup[spec.block_formats.cpu().long()].expand(shape[0], -1)
    return used, blocks[:, 0] if bool((blocks == blocks[:, :1]).all()) else blocks


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major, little-endian order, wherever and however it is stored."""
    dense = tensor.detach().cpu().contiguous()
    flat = dense.as_strided((dense.numel(),), (1,))  # a single number may say that the next one is far away
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")


def pack_matrix(encoded: Encoded, spec: MatrixSpec) -> dict[str, Tensor]:
    """The parts of a matrix as they are stored.

    Returns:
        For each format that some row has, `{format name: uint8 [row blocks, bytes]}`, the codes of its rows, in row
        order, and `{"<format name>.scales": float16 [row blocks, groups, 16]}`, their scales, both laid out as
        `layout.py` says; `"row_formats"`: as `pack_indices` of [1, rows], if rows may differ. Where blocks have
        formats, they take the place of rows, row by row, and the shorter last groups are apart from the others in
        `"<format name>.tail"` and `"<format name>.tail.scales"`; `"block_formats"`: as `pack_indices` of
        [rows, groups], or of [1, groups] when all rows are alike.

    Raises:
        ValueError: a code is out of its format's range, or the shapes do not fit together.
    """
    parts = {}
    for part, number_format, group_size, (codes, scales) in encoded_parts(encoded, spec):
        parts[part] = number_format.pack(codes, group_size)
        parts[part + SCALES] = layout.pack_scales(scales)
    return parts | _choices(spec)


def encoded_parts(encoded: Encoded, spec: MatrixSpec) -> Iterator[tuple[str, Format, int, Encoded]]:
    """Name, format, group size, and codes and scales [rows or blocks in the part, ...] of each part of codes."""
    for strip in spec.strips(encoded.codes.shape):
        codes, scales = strip.encoded(encoded)
        for number_format, rows in strip.spec.parts:
            selected = Encoded(_select(codes, rows), _select(scales, rows))
            yield number_format.name + strip.suffix, number_format, strip.spec.group_size, selected


def _choices(spec: MatrixSpec) -> dict[str, Tensor]:
    """The part that says which row or block has which format, if one does."""
    if spec.row_formats is not None:
        return {ROW_FORMATS: pack_indices(spec.row_formats[None], len(spec.formats))}
    if spec.block_formats is not None:
        return {BLOCK_FORMATS: pack_indices(spec.block_formats, len(spec.formats))}
    return {}


def part_shapes(spec: MatrixSpec, shape: tuple[int, int]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of each part that `pack_matrix` stores of a matrix [rows, cols], by name of the part.

    Raises:
        ValueError: the specification is for another shape.
    """
    parts: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for strip in spec.strips(shape):
        for number_format, chosen in strip.spec.parts:
            part = number_format.name + strip.suffix
            parts |= code_parts(part, (strip.rows if chosen is None else len(chosen), strip.width), spec.group_size)
    for name, indices in (ROW_FORMATS, spec.row_formats), (BLOCK_FORMATS, spec.block_formats):
        if indices is not None:
            rows, columns = indices.shape if indices.dim() == 2 else (1, len(indices))
            parts[name] = (torch.uint8, (rows, index_columns(columns, len(spec.formats))))
    return parts


def stored_shapes(spec: MatrixSpec, shape: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of bytes that is stored of a matrix [rows, cols], by name of the part (see `_joined.py`).

    Raises:
        ValueError: the specification is for another shape.
    """
    shapes = part_shapes(spec, shape)
    sizes = {part: dtype.itemsize * math.prod(size) for part, (dtype, size) in shapes.items()}
    return {
        part: (joined_bytes(sizes[part] + sizes[part + SCALES]),) if part + SCALES in shapes else size
        for part, (_, size) in shapes.items()
        if not part.endswith(SCALES)
    }


def joined_bytes(size: int) -> int:
    """Bytes that codes and scales of `size` bytes take together in a file: whole vectors."""
    return -(-size // layout.VECTOR) * layout.VECTOR


def code_parts(part: str, shape: tuple[int, int], group_size: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of the part of that name, a format's with or without `.tail`, and of its scales.

    Args:
        part: its name.
        shape: rows of the matrix that are in it, or blocks, and columns of each.
        group_size: columns that share a scale.
    """
    rows, cols = shape
    number_format = get(part.removesuffix(TAIL))
    scales = (layout.row_blocks(rows), group_count(cols, group_size), layout.ROWS)
    return {
        part: (torch.uint8, number_format.packed_shape(rows, cols, group_size)),
        part + SCALES: (torch.float16, scales),
    }


def unpack_matrix(
    parts: Mapping[str, Tensor], formats: Sequence[str], group_size: int, shape: tuple[int, int]
) -> tuple[Encoded, MatrixSpec]:
    """The inverse of `pack_matrix`, trusting nothing.

    Args:
        parts: what `pack_matrix` returned, perhaps damaged.
        formats: names of the formats, in the order that `row_formats` or `block_formats` counts them.
        group_size: weights of a row that share a scale.
        shape: (rows, cols) of the matrix.

    Raises:
        ValueError: a part is missing, unknown, of a wrong shape or dtype, or holds a value that `pack_matrix` cannot
            have written; one sentence.
    """
    spec = unpack_spec(parts, formats, group_size, shape)
    strips = spec.strips(shape)
    known = {part.name + strip.suffix for strip in strips for part, _ in strip.spec.parts}
    known |= {part + SCALES for part in known} | _choices(spec).keys()
    if extra := set(parts) - known:
        raise ValueError(f"the part {min(extra)} does not belong to it")
    unpacked = [_unpack_strip(parts, strip) for strip in strips]
    codes = join_strips(strips, [each.codes for each in unpacked])
    return Encoded(codes, join_strips(strips, [each.scales for each in unpacked])), spec


def unpack_spec(
    parts: Mapping[str, Tensor], formats: Sequence[str], group_size: int, shape: tuple[int, int]
) -> MatrixSpec:
    """The specification of a matrix, from the part that says which row or block has which format, if there is one.

    Args:
        parts: as of `unpack_matrix`; only that one is looked at.
        formats, group_size, shape: as of `unpack_matrix`.

    Raises:
        ValueError: as `unpack_matrix`.
    """
    rows, cols = shape
    if BLOCK_FORMATS in parts:
        groups = group_count(cols, group_size)
        alike = parts[BLOCK_FORMATS].shape[:1] == (1,)
        blocks = _unpack_choice(parts, BLOCK_FORMATS, (1 if alike else rows, groups), len(formats))
        return MatrixSpec(tuple(formats), group_size, block_formats=blocks)
    if ROW_FORMATS in parts:
        chosen = _unpack_choice(parts, ROW_FORMATS, (1, rows), len(formats))[0]
        return MatrixSpec(tuple(formats), group_size, row_formats=chosen)
    return MatrixSpec(tuple(formats), group_size)


def _unpack_choice(parts: Mapping[str, Tensor], name: str, shape: tuple[int, int], count: int) -> Tensor:
    packed = _checked_part(parts, name, torch.uint8, (shape[0], index_columns(shape[1], count)))
    return unpack_indices(packed, shape[1], count)


def _unpack_strip(parts: Mapping[str, Tensor], strip: BlockView) -> Encoded:
    """Codes int8 [rows, width] and scales float16 [rows, groups] of a strip."""
    codes, scales = [], []
    group_size = strip.spec.group_size
    for number_format, chosen in strip.spec.parts:
        part = number_format.name + strip.suffix
        shape = (strip.rows if chosen is None else len(chosen), strip.width)
        stored = {
            name: _checked_part(parts, name, *about) for name, about in code_parts(part, shape, group_size).items()
        }
        if not torch.isfinite(stored[part + SCALES]).all() or torch.signbit(stored[part + SCALES]).any():
            raise ValueError("a scale is negative or not finite")
        codes.append((number_format.unpack(stored[part], shape, group_size), chosen))
        scales.append((layout.unpack_scales(stored[part + SCALES], shape[0]), chosen))
    device = codes[0][0].device
    groups = group_count(strip.width, group_size)
    return Encoded(
        _merge(codes, (strip.rows, strip.width), torch.int8, device),
        _merge(scales, (strip.rows, groups), torch.float16, device),
    )


def _checked_part(parts: Mapping[str, Tensor], name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if name not in parts:
        raise ValueError(f"the part {name} is missing")
    part = parts[name]
    if part.dtype != dtype or tuple(part.shape) != shape:
        raise ValueError(f"the part {name} must be {dtype} {list(shape)}, got {part.dtype} {list(part.shape)}")
    return part
