"""One weight matrix, whose rows or blocks may have different formats.

Some rows of a matrix matter more than others, and a row is the natural unit of mixed precision, since a row makes one
output and its products add up in one place. A `MatrixSpec` says which format each row has, or which one all rows have.

A *block* is a group of one row, the smallest unit that can have a format, since it has a scale of its own already.
Formats of blocks need no second implementation. The columns of whole groups, read group by group, are a matrix whose
rows are blocks; the shorter last groups of all rows are another one. Such a matrix is a `BlockView`, and all functions
below treat a matrix of blocks as its one or two views.
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
from edgerazor.formats.core.indices import index_row_bytes, pack_indices, unpack_indices
from edgerazor.formats.core.rotation import Rotation

#: Names of the parts of a packed matrix that hold the format index of each row, or of each block.
ROW_FORMATS, BLOCK_FORMATS = "row_formats", "block_formats"
#: End of the name of the part with the scales of the part whose name stands before it.
SCALES = ".scales"
#: End of the name of the part with the shorter last groups of a format, where blocks have formats.
TAIL = ".tail"


def names() -> list[str]:
    """Names of the number formats, sorted."""
    return registry.names("formats")


@cache
def get(name: str) -> Format:
    """The number format of that name.

    Raises:
        UserError: there is no such format; the message names the closest ones.
    """
    number_format: Format = registry.find("formats", name, "FORMAT")
    return number_format


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
            This says how to encode, not what is stored.
        rotation: codes are of the rotated weight; None: of the model's own. Functions that encode and decode take and
            give what codes are of; `rotate`, `rotate_back` and `rounded_weight` know of the model's own weight.
    """

    formats: tuple[str, ...]
    group_size: int
    row_formats: Tensor | None = None
    block_formats: Tensor | None = None
    published: bool = False
    rotation: Rotation | None = None

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
        """Format name -> number of weights of a matrix [rows, cols], for the formats that some weight has."""
        counts = dict.fromkeys(self.formats, 0)
        for view in self.block_views(shape):
            for number_format, rows in view.spec.format_rows:
                counts[number_format.name] += view.width * (view.rows if rows is None else len(rows))
        return {name: count for name, count in counts.items() if count}

    def nominal_bits(self, shape: tuple[int, int]) -> float:
        """Mean nominal bits per weight of a matrix [rows, cols]."""
        counts = self.weights_by_format(shape)
        total = sum(counts.values())
        if not total:
            return get(self.formats[0]).nominal_bits
        return sum(get(name).nominal_bits * count for name, count in counts.items()) / total

    def packed_bytes(self, shape: tuple[int, int]) -> int:
        """Bytes of all stored parts of a matrix [rows, cols]."""
        return sum(math.prod(size) for size in stored_shapes(self, shape).values())

    def check_shape(self, shape: Sequence[int]) -> None:
        """ValueError unless the specification is one for a matrix of that shape [rows, cols]."""
        if self.row_formats is not None and len(self.row_formats) != shape[0]:
            raise ValueError(f"there are formats for {len(self.row_formats)} rows, but the matrix has {shape[0]}")
        if self.block_formats is not None:
            expected = (shape[0], group_count(shape[1], self.group_size))
            shape_of_formats = tuple(self.block_formats.shape)
            if shape_of_formats not in (expected, (1, expected[1])):
                raise ValueError(
                    f"there are formats for {list(shape_of_formats)} blocks, but the matrix has {list(expected)}"
                )

    def rotate(self, w: Tensor) -> Tensor:
        """The weight that codes are of, floating [rows, cols], for the model's own: itself, or float32 and rotated."""
        return w if self.rotation is None else self.rotation.rotate(w)

    def rotate_back(self, w: Tensor) -> Tensor:
        """The model's own weight, floating [rows, cols], for the one that codes are of."""
        return w if self.rotation is None else self.rotation.rotate_back(w)

    def block_views(self, shape: Sequence[int]) -> list[BlockView]:
        """The matrix [rows, cols] as one or two matrices whose rows have formats: itself, or its blocks.

        Raises:
            ValueError: the specification is for another shape.
        """
        self.check_shape(shape)
        rows, cols = shape
        if self.block_formats is None:
            return [BlockView(slice(0, cols), slice(0, group_count(cols, self.group_size)), 1, rows, cols, self, "")]
        if (rows, cols) not in self._block_views:
            self._block_views.clear()
            self._block_views[rows, cols] = list(self._cut(self.block_formats, rows, cols))
        return self._block_views[rows, cols]

    def _cut(self, block_formats: Tensor, rows: int, cols: int) -> Iterator[BlockView]:
        group = min(self.group_size, cols)
        whole = cols // group
        all_formats = block_formats.expand(rows, -1)
        group_runs = [(0, whole, group, "")]
        if cols % group:
            group_runs.append((whole, whole + 1, cols % group, TAIL))
        for start, stop, width, suffix in group_runs:
            row_formats = all_formats[:, start:stop].reshape(-1)
            spec = replace(self, group_size=width, row_formats=row_formats, block_formats=None, rotation=None)
            columns = slice(start * group, start * group + (stop - start) * width)
            yield BlockView(columns, slice(start, stop), stop - start, rows * (stop - start), width, spec, suffix)

    @cached_property
    def _block_views(self) -> dict[tuple[int, int], list[BlockView]]:
        """The views of the last shape: in training it is always the same one."""
        return {}

    @cached_property
    def format_rows(self) -> list[tuple[Format, Tensor | None]]:
        """Each format that some row has, with the indices (int64, ascending) of its rows; None means all rows.

        Where blocks have formats, no row has one: ask the specifications of the `block_views`.
        """
        if self.block_formats is not None:
            raise ValueError("the format changes within a row")
        if self.row_formats is None:
            return [(get(self.formats[0]), None)]
        rows_by_name = [(name, (self.row_formats == i).nonzero().flatten()) for i, name in enumerate(self.formats)]
        return [(get(name), rows) for name, rows in rows_by_name if len(rows)]

    def native_problem(self) -> str:
        """What native kernels cannot read of such a matrix, in words; empty where they can read all of it."""
        if self.block_formats is not None:
            return "formats of blocks"
        unreadable = [name for name in self.formats if get(name).kernel_bits is None]
        return f"the format {unreadable[0]}" if unreadable else ""

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
        blocks: rows of the view that come from one row of the matrix.
        rows, width: shape of the view.
        spec: formats of its rows.
        suffix: end of the names of its packed parts.
    """

    columns: slice
    groups: slice
    blocks: int
    rows: int
    width: int
    spec: MatrixSpec
    suffix: str

    def select(self, matrix: Tensor) -> Tensor:
        """The view [rows, width] of a matrix [rows, cols]; it shares memory where it can."""
        return matrix[:, self.columns].reshape(self.rows, self.width)

    def select_scales(self, scales: Tensor) -> Tensor:
        """The scales of the view, from those of the whole matrix [rows, groups]."""
        return scales[:, self.groups].reshape(self.rows, group_count(self.width, self.spec.group_size))

    def select_encoded(self, encoded: Encoded) -> Encoded:
        """The view of an encoded matrix."""
        return Encoded(self.select(encoded.codes), self.select_scales(encoded.scales))


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
        views = spec.block_views(w.shape)
        parts = [
            encode_matrix(view.select(w.detach()), view.spec, None if scales is None else view.select_scales(scales))
            for view in views
        ]
        return _join_encoded(views, parts)
    spec.check_shape(w.shape)
    w = w.detach()
    if spec.row_formats is None:
        return spec.format_rows[0][0].encode(w, spec.group_size, scales, spec.published)
    codes = torch.empty(w.shape, dtype=torch.int8, device=w.device)
    stored = torch.empty(w.shape[0], group_count(w.shape[1], spec.group_size), dtype=torch.float16, device=w.device)
    for number_format, rows in spec.format_rows:
        assert rows is not None
        for block in rows.to(w.device).split(block_rows(w)):  # gathered, encoded and put back while in the cache
            block_scales = None if scales is None else scales.index_select(0, block)
            part = number_format.encode(w.index_select(0, block), spec.group_size, block_scales, spec.published)
            codes.index_copy_(0, block, part.codes)
            stored.index_copy_(0, block, part.scales)
    return Encoded(codes, stored)


def decode_matrix(encoded: Encoded, spec: MatrixSpec) -> Tensor:
    """The dequantized weights, float32 [rows, cols], of an encoded matrix.

    Raises:
        ValueError: the shapes do not fit together.
    """
    codes, scales = encoded
    if spec.block_formats is not None:
        views = spec.block_views(codes.shape)
        return join_block_views(views, [decode_matrix(view.select_encoded(encoded), view.spec) for view in views])
    spec.check_shape(codes.shape)
    decoded = [
        (number_format.decode(select_rows(codes, rows), select_rows(scales, rows), spec.group_size), rows)
        for number_format, rows in spec.format_rows
    ]
    return merge_rows(decoded, (*codes.shape,), torch.float32, codes.device)


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
    """`decode_matrix(encode_matrix(w, scales))` [rows, cols] in `dtype`, without gradient and block by block.

    No copy of the whole matrix in another dtype is made on the way.

    Raises:
        ValueError: as `encode_matrix`.
    """
    if spec.block_formats is not None:
        views = spec.block_views(w.shape)
        parts = [
            quantize_dequantize(
                view.select(w), view.spec, dtype, None if scales is None else view.select_scales(scales)
            )
            for view in views
        ]
        return join_block_views(views, parts)
    spec.check_shape(w.shape)
    if spec.row_formats is None:
        return spec.format_rows[0][0].quantize_dequantize(w, spec.group_size, dtype, scales, spec.published)
    decoded = torch.empty(w.shape, dtype=dtype, device=w.device)
    for number_format, rows in spec.format_rows:
        assert rows is not None
        for block in rows.to(w.device).split(block_rows(w)):  # gathered, rounded and put back while in the cache
            block_scales = None if scales is None else scales.index_select(0, block)
            part = number_format.quantize_dequantize(
                w.index_select(0, block), spec.group_size, dtype, block_scales, spec.published
            )
            decoded.index_copy_(0, block, part)
    return decoded


def rounded_weight(
    w: Tensor, spec: MatrixSpec, dtype: torch.dtype = torch.float32, scales: Tensor | None = None
) -> Tensor:
    """What the model's own weight w [rows, cols] is worth when it is stored so, in `dtype`: as `quantize_dequantize`,
    with a rotation before it and back behind it where the specification has one.

    Raises:
        ValueError: as `encode_matrix`.
    """
    if spec.rotation is None:
        return quantize_dequantize(w, spec, dtype, scales)
    return spec.rotate_back(quantize_dequantize(spec.rotate(w), spec, torch.float32, scales)).to(dtype)


def join_block_views(views: list[BlockView], parts: list[Tensor]) -> Tensor:
    """The whole matrix [rows, ...] from a tensor [rows of the view, n] for each of its block views."""
    merged = [
        part.reshape(view.rows // view.blocks, view.blocks * part.shape[1])
        for view, part in zip(views, parts, strict=True)
    ]
    return merged[0] if len(merged) == 1 else torch.cat(merged, dim=1)


def _join_encoded(views: list[BlockView], parts: list[Encoded]) -> Encoded:
    """The whole encoded matrix from its block views."""
    codes = join_block_views(views, [part.codes for part in parts])
    return Encoded(codes, join_block_views(views, [part.scales for part in parts]))


def select_rows(matrix: Tensor, rows: Tensor | None) -> Tensor:
    """These rows of the matrix; all of them where `rows` is None."""
    return matrix if rows is None else matrix.index_select(0, rows.to(matrix.device))


def merge_rows(
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
    used, indices = _canonical_formats(spec, codes.shape)
    metadata = {"shape": list(codes.shape), "group_size": min(spec.group_size, codes.shape[1]), "formats": used}
    if indices.dim() == 2:
        metadata["unit"] = "block"
    sha = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for tensor in (indices, codes, scales):
        sha.update(tensor_bytes(tensor))
    return sha.hexdigest()


def _canonical_formats(spec: MatrixSpec, shape: torch.Size) -> tuple[list[str], Tensor]:
    """The formats in use, sorted, and an index into them as uint8 [rows], or [rows, groups] where that is needed."""
    used = sorted(
        {number_format.name for view in spec.block_views(shape) for number_format, _ in view.spec.format_rows}
    )
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
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def pack_matrix(encoded: Encoded, spec: MatrixSpec) -> dict[str, Tensor]:
    """The parts of a matrix as they are stored.

    Returns:
        For each format that some row has, `{format name: uint8 [row blocks, bytes]}`, the codes of its rows in row
        order, and `{"<format name>.scales": float16 [row blocks, groups, 16]}`, their scales, both laid out as
        `layout.py` says. Where rows may differ, `"row_formats"`: the result of `pack_indices` for [1, rows]. Where
        blocks have formats, blocks take the place of rows, row by row; the shorter last groups stand apart in
        `"<format name>.tail"` and `"<format name>.tail.scales"`; and `"block_formats"` is the result of `pack_indices`
        for [rows, groups], or for [1, groups] when all rows are alike.

    Raises:
        ValueError: a code is out of its format's range, or the shapes do not fit together.
    """
    parts = {}
    for part, number_format, group_size, (codes, scales) in encoded_parts(encoded, spec):
        parts[part] = number_format.pack(codes, group_size)
        parts[part + SCALES] = layout.pack_scales(scales)
    return parts | _format_index_parts(spec)


def encoded_parts(encoded: Encoded, spec: MatrixSpec) -> Iterator[tuple[str, Format, int, Encoded]]:
    """Name, format, group size, and codes and scales [rows or blocks in the part, ...] of each part of codes."""
    for view in spec.block_views(encoded.codes.shape):
        codes, scales = view.select_encoded(encoded)
        for number_format, rows in view.spec.format_rows:
            selected = Encoded(select_rows(codes, rows), select_rows(scales, rows))
            yield number_format.name + view.suffix, number_format, view.spec.group_size, selected


def _format_index_parts(spec: MatrixSpec) -> dict[str, Tensor]:
    """The part with the format index of each row or block; none where the whole matrix has one format."""
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
    for view in spec.block_views(shape):
        for number_format, rows in view.spec.format_rows:
            part = number_format.name + view.suffix
            parts |= code_parts(part, (view.rows if rows is None else len(rows), view.width), spec.group_size)
    for name, indices in (ROW_FORMATS, spec.row_formats), (BLOCK_FORMATS, spec.block_formats):
        if indices is not None:
            index_rows, columns = indices.shape if indices.dim() == 2 else (1, len(indices))
            parts[name] = (torch.uint8, (index_rows, index_row_bytes(columns, len(spec.formats))))
    return parts


def stored_shapes(spec: MatrixSpec, shape: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of bytes that is stored of a matrix [rows, cols], by part (see `serialization.py`).

    Raises:
        ValueError: the specification is for another shape.
    """
    shapes = part_shapes(spec, shape)
    sizes = {part: dtype.itemsize * math.prod(size) for part, (dtype, size) in shapes.items()}
    return {
        part: (stored_part_bytes(sizes[part] + sizes[part + SCALES]),) if part + SCALES in shapes else size
        for part, (_, size) in shapes.items()
        if not part.endswith(SCALES)
    }


def stored_part_bytes(size: int) -> int:
    """Bytes that a part whose codes and scales have `size` bytes takes in a file: whole vectors."""
    return -(-size // layout.VECTOR) * layout.VECTOR


def code_parts(part: str, shape: tuple[int, int], group_size: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of a part of codes and of the part of its scales.

    Args:
        part: its name, that of a format with or without `.tail`.
        shape: the rows or blocks in it, and the columns of each.
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
        formats: names of the formats; `row_formats` and `block_formats` hold indices into them.
        group_size: weights of a row that share a scale.
        shape: (rows, cols) of the matrix.

    Raises:
        ValueError: a part is missing, unknown, of a wrong shape or dtype, or holds a value that `pack_matrix` cannot
            have written; one sentence.
    """
    spec = unpack_spec(parts, formats, group_size, shape)
    views = spec.block_views(shape)
    known = {number_format.name + view.suffix for view in views for number_format, _ in view.spec.format_rows}
    known |= {part + SCALES for part in known} | _format_index_parts(spec).keys()
    if extra := set(parts) - known:
        raise ValueError(f"the part {min(extra)} does not belong to it")
    return _join_encoded(views, [_unpack_view(parts, view) for view in views]), spec


def unpack_spec(
    parts: Mapping[str, Tensor], formats: Sequence[str], group_size: int, shape: tuple[int, int]
) -> MatrixSpec:
    """The specification of a matrix, from the part with the format index of each row or block, if there is one.

    Args:
        parts: as for `unpack_matrix`; only that part is read.
        formats, group_size, shape: as for `unpack_matrix`.

    Raises:
        ValueError: as `unpack_matrix`.
    """
    rows, cols = shape
    if BLOCK_FORMATS in parts:
        groups = group_count(cols, group_size)
        alike = parts[BLOCK_FORMATS].shape[:1] == (1,)
        blocks = _unpack_format_indices(parts, BLOCK_FORMATS, (1 if alike else rows, groups), len(formats))
        return MatrixSpec(tuple(formats), group_size, block_formats=blocks)
    if ROW_FORMATS in parts:
        row_formats = _unpack_format_indices(parts, ROW_FORMATS, (1, rows), len(formats))[0]
        return MatrixSpec(tuple(formats), group_size, row_formats=row_formats)
    return MatrixSpec(tuple(formats), group_size)


def _unpack_format_indices(parts: Mapping[str, Tensor], name: str, shape: tuple[int, int], count: int) -> Tensor:
    packed = _checked_part(parts, name, torch.uint8, (shape[0], index_row_bytes(shape[1], count)))
    return unpack_indices(packed, shape[1], count)


def _unpack_view(parts: Mapping[str, Tensor], view: BlockView) -> Encoded:
    """Codes int8 [rows, width] and scales float16 [rows, groups] of a block view."""
    codes, scales = [], []
    group_size = view.spec.group_size
    for number_format, rows in view.spec.format_rows:
        part = number_format.name + view.suffix
        shape = (view.rows if rows is None else len(rows), view.width)
        stored = {
            name: _checked_part(parts, name, dtype, size)
            for name, (dtype, size) in code_parts(part, shape, group_size).items()
        }
        if not torch.isfinite(stored[part + SCALES]).all() or torch.signbit(stored[part + SCALES]).any():
            raise ValueError("a scale is negative or not finite")
        codes.append((number_format.unpack(stored[part], shape, group_size), rows))
        scales.append((layout.unpack_scales(stored[part + SCALES], shape[0]), rows))
    device = codes[0][0].device
    groups = group_count(view.width, group_size)
    return Encoded(
        merge_rows(codes, (view.rows, view.width), torch.int8, device),
        merge_rows(scales, (view.rows, groups), torch.float16, device),
    )


def _checked_part(parts: Mapping[str, Tensor], name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if name not in parts:
        raise ValueError(f"the part {name} is missing")
    part = parts[name]
    if part.dtype != dtype or tuple(part.shape) != shape:
        raise ValueError(f"the part {name} must be {dtype} {list(shape)}, got {part.dtype} {list(part.shape)}")
    return part
