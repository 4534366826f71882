"""The kernel library through ctypes: products with packed matrices in the layout in which they are stored.

What the library computes is `reference.linear`, to the bit: the same integer sums, and the same float32 operations in
the same order, whatever the instruction set and the number of tokens. (With float32 activations there are no integer
sums, and it is `reference.decoded_linear` up to the rounding of float32 sums.)
"""

from __future__ import annotations

import copy
import ctypes
import functools
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from ctypes import POINTER, c_char_p, c_float, c_int, c_int32, c_int64, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from edgerazor.errors import plain
from edgerazor.formats import SCALES, SMALLEST, Format, MatrixSpec, Rotation, absmax_units

#: Rows of a row block, and row blocks of the largest tile of a GEMM.
ROWS, TILE = 16, 4
#: The library takes numbers of rows and columns, and other sizes, as int32.
LARGEST = (1 << 31) - 1
NOT_BUILT = "the native library is not built"


class NotFiniteError(ValueError):
    """An activation is infinite or not a number."""


class FormatRowsStructure(ctypes.Structure):
    """`edgerazor_format_rows` of `cpp/library.h`."""

    _fields_ = (
        ("codes", c_void_p),
        ("scales", c_void_p),
        ("rows", c_void_p),
        ("count", c_int64),
        ("bits", c_int32),
        ("min_level_x2", c_int32),
    )


class CodeRangeStructure(ctypes.Structure):
    """`edgerazor_code_range` of `cpp/library.h`."""

    _fields_ = (("min_code", c_float), ("max_code", c_float), ("mid_rise", c_int32))


class WeightRowsStructure(ctypes.Structure):
    """`edgerazor_weight_rows` of `cpp/library.h`."""

    _fields_ = (
        ("weights", c_void_p),
        ("scales", c_void_p),
        ("rows", c_void_p),
        ("count", c_int64),
        ("columns", c_int64),
        ("group", c_int64),
    )


class ScaleSearchStructure(ctypes.Structure):
    """`edgerazor_scale_search` of `cpp/library.h`."""

    _fields_ = (
        ("ratios", POINTER(c_float)),
        ("count", c_int32),
        ("refinements", c_int32),
        ("rms_factor", c_float),
        ("absmax_units", c_float),
        ("min_code", c_float),
        ("max_code", c_float),
        ("mid_rise", c_int32),
    )


_SIGNATURES = {
    "edgerazor_isa_count": (c_int, []),
    "edgerazor_isa_name": (c_char_p, [c_int]),
    "edgerazor_row_layout_new": (c_void_p, [c_int32, c_int32, c_int32]),
    "edgerazor_row_layout_free": (None, [c_void_p]),
    "edgerazor_activation_bytes": (c_int64, [c_void_p]),
    "edgerazor_segments": (c_int64, [c_void_p]),
    "edgerazor_block_bytes": (c_int64, [c_void_p, c_int32]),
    "edgerazor_quantize": (c_int64, [c_void_p, c_int, c_void_p, c_int64, c_int32, c_float, *[c_void_p] * 3]),
    "edgerazor_rotate": (None, [c_int, c_void_p, c_int64, c_int32, c_int32, c_void_p, c_int32, c_void_p]),
    "edgerazor_linear": (
        None,
        [c_void_p, c_int, POINTER(FormatRowsStructure), c_int64, *[c_void_p] * 5, c_int64, c_int64, c_int64],
    ),
    "edgerazor_linear_float": (
        None,
        [c_void_p, c_int, POINTER(FormatRowsStructure), c_int64, *[c_void_p] * 3, c_int64, c_int64, c_int64],
    ),
    "edgerazor_dequantize_row": (None, [c_void_p, POINTER(FormatRowsStructure), c_int64, c_void_p]),
    "edgerazor_expand_ternary": (None, [c_void_p, c_int, c_void_p, c_int64, c_void_p]),
    "edgerazor_least_error": (
        c_int64,
        [c_int, POINTER(ScaleSearchStructure), c_void_p, c_int64, c_int64, *[c_void_p] * 2],
    ),
    "edgerazor_round_weights": (
        c_int64,
        [c_int, POINTER(CodeRangeStructure), POINTER(WeightRowsStructure), c_int32, c_void_p],
    ),
    "edgerazor_learned_gradients": (
        None,
        [c_int, POINTER(CodeRangeStructure), POINTER(WeightRowsStructure), *[c_void_p] * 3],
    ),
    "edgerazor_read": (c_uint64, [c_int, c_void_p, c_int64]),
}


def library() -> ctypes.CDLL | None:
    """The library, or None where there is none to use; `missing` says why."""
    return _opened()[0]


def missing() -> str:
    """Why `library` returns None, as the end of a sentence."""
    return _opened()[1] or NOT_BUILT


@cache
def _opened() -> tuple[ctypes.CDLL | None, str]:
    """The library, or what is wrong with it: a call of a damaged one, or of one of other sources, could do anything."""
    # Imported here, because `python -m edgerazor.kernels.build` runs it as a program: the package must not import it.
    from edgerazor.kernels import build

    path = Path(__file__).with_name(build.LIBRARY)
    try:
        if not path.exists():
            return None, NOT_BUILT
        if problem := build.problem(path.read_bytes()):
            return None, f"the native library {path} {problem}"
        opened = ctypes.CDLL(str(path))
        fingerprint = build.fingerprint()
    except OSError as error:
        return None, f"the native library {path} cannot be loaded ({plain(error)})"
    sources = getattr(opened, "edgerazor_sources", None)
    if sources is not None:
        sources.restype, sources.argtypes = c_char_p, []
    if sources is None or sources().decode() != fingerprint:
        return None, "the native library was built from other sources"
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(opened, name)
        function.restype, function.argtypes = result, arguments
    return opened, ""


def loaded() -> ctypes.CDLL:
    """The library.

    Raises:
        RuntimeError: there is none to use.
    """
    opened = library()
    if opened is None:
        raise RuntimeError(f"{missing()}: run python -m edgerazor.kernels.build")
    return opened


@cache
def isas() -> tuple[str, ...]:
    """Names of the instruction sets that this machine can run, the best one last; empty without the library."""
    opened = library()
    if opened is None:
        return ()
    return tuple(opened.edgerazor_isa_name(isa).decode() for isa in range(opened.edgerazor_isa_count()))


class RowLayout:
    """How the rows of matrices with `columns` columns are cut into segments.

    Neither the group of the weights nor that of the activations changes within a segment.

    Args:
        columns: of a row, at least 1.
        group_size: columns of the weights that share a scale.
        activation_group: features of the activations that share a scale.

    Raises:
        ValueError: a size is out of range.
        MemoryError: there is not enough memory.
    """

    def __init__(self, columns: int, group_size: int, activation_group: int) -> None:
        if min(columns, group_size, activation_group) < 1:
            raise ValueError(f"columns and groups must be at least 1: {columns}, {group_size}, {activation_group}")
        if columns > LARGEST:
            raise ValueError(f"there are no matrices of {columns} columns")
        self.columns = columns
        self.groups = -(-columns // group_size)
        sizes = (min(size, columns) for size in (group_size, activation_group))
        self.handle = c_void_p(loaded().edgerazor_row_layout_new(columns, *sizes))
        if not self.handle:
            raise MemoryError("there is not enough memory for a matrix")
        self.activation_bytes: int = loaded().edgerazor_activation_bytes(self.handle)
        self.segments: int = loaded().edgerazor_segments(self.handle)
        weakref.finalize(self, loaded().edgerazor_row_layout_free, self.handle)

    def block_bytes(self, bits: int) -> int:
        """Bytes of the codes of a block of 16 rows; 0 bits stand for ternary codes in base 3."""
        size: int = loaded().edgerazor_block_bytes(self.handle, bits)
        return size


@dataclass(frozen=True, eq=False)
class FormatRows:
    """The rows of a matrix that have one format, as they are stored.

    Attributes:
        codes: uint8 [row blocks, bytes of a block].
        scales: float16 [row blocks, groups, 16].
        count: number of rows.
        bits: 0 for ternary codes in base 3, else 1 to 8.
        min_level_x2: twice the level of the lowest code.
        rows: int32 [count], which row of the matrix each of them is; None if they are all rows of the matrix.
    """

    codes: Tensor
    scales: Tensor
    count: int
    bits: int
    min_level_x2: int
    rows: Tensor | None = None

    @classmethod
    def of(
        cls, codes: Tensor, scales: Tensor, count: int, number_format: Format, rows: Tensor | None = None
    ) -> FormatRows:
        """Rows of `number_format` from the tensors in which it is stored.

        Raises:
            ValueError: the kernels cannot read the codes of the format.
        """
        bits = number_format.kernel_bits
        if bits is None:
            raise ValueError(f"native kernels cannot read codes of {number_format.name}")
        min_code = -1 if bits == 0 else -(1 << (bits - 1))
        level = number_format.level_(torch.tensor([float(min_code)]))
        return cls(codes, scales, count, bits, round(2 * float(level)), rows)

    @property
    def blocks(self) -> int:
        """Number of row blocks."""
        return -(-self.count // ROWS)

    def check(self, layout: RowLayout, out: int | None = None) -> None:
        """Checks the tensors against the layout and, where `out` is given, that the rows are those of a matrix.

        Args:
            layout: of the matrix.
            out: number of rows of the matrix.

        Raises:
            ValueError: a tensor has another dtype or shape, or a row is not between 0 and out - 1.
        """
        width = layout.block_bytes(self.bits)
        expected = [
            ("codes", self.codes, torch.uint8, (self.blocks, width)),
            ("scales", self.scales, torch.float16, (self.blocks, layout.groups, ROWS)),
        ]
        if self.rows is not None:
            expected.append(("rows", self.rows, torch.int32, (self.count,)))
        for name, tensor, dtype, shape in expected:
            if tensor.dtype != dtype or tuple(tensor.shape) != shape or not tensor.is_contiguous():
                got = f"{tensor.dtype} {list(tensor.shape)}"
                raise ValueError(f"{name} must be contiguous {dtype} {list(shape)}, got {got}")
        if (
            self.rows is not None
            and out is not None
            and self.count
            and not 0 <= self.rows.min() <= self.rows.max() < out
        ):
            raise ValueError(f"the places of rows must be between 0 and {out - 1}")

    def structure(self) -> FormatRowsStructure:
        """The structure for the library, which is valid while this object lives."""
        rows = None if self.rows is None else self.rows.data_ptr()
        return FormatRowsStructure(
            self.codes.data_ptr(), self.scales.data_ptr(), rows, self.count, self.bits, self.min_level_x2
        )


@dataclass(frozen=True, eq=False)
class QuantizedActivations:
    """Quantized activations: codes int8 [tokens, bytes], scales float32 and sums int32 of codes [tokens, segments]."""

    codes: Tensor
    scales: Tensor
    sums: Tensor


def quantize(
    x: Tensor, layout: RowLayout, bits: int = 8, scale: float | None = None, isa: int = -1
) -> QuantizedActivations:
    """Quantizes activations for products with matrices of this layout.

    Args:
        x: float [tokens, columns].
        layout: of the matrices.
        bits: of the codes, 2 to 8.
        scale: static scale of all activations; None computes one for each group of each token.
        isa: number of the instruction set.

    Raises:
        NotFiniteError: a value is infinite or not a number.
        ValueError: the bits are not 2 to 8, or x has another number of features.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"activations are quantized to 2 to 8 bits, not {bits}")
    if x.shape[1] != layout.columns:
        raise ValueError(f"the matrix has {layout.columns} columns, but its input has {x.shape[1]} features")
    x = x.float().contiguous()
    codes = torch.empty(len(x), layout.activation_bytes, dtype=torch.int8)
    scales = torch.empty(len(x), layout.segments)
    sums = torch.empty(len(x), layout.segments, dtype=torch.int32)
    pointers = (codes.data_ptr(), scales.data_ptr(), sums.data_ptr())
    bad_token = loaded().edgerazor_quantize(
        layout.handle, isa % len(isas()), x.data_ptr(), len(x), bits, scale or 0.0, *pointers
    )
    if bad_token >= 0:
        raise NotFiniteError("an activation is not finite")
    return QuantizedActivations(codes, scales, sums)


def rotate(x: Tensor, rotation: Rotation, back: bool = False, isa: int = -1, threads: int = 1) -> Tensor:
    """`x R`, or `x Rᵀ` where `back`, on the CPU: the bits of `rotation.rotate` and `rotation.rotate_back`.

    Args:
        x: floating [..., columns].
        rotation: of so many columns.
        back: whether x is rotated back.
        isa: number of the instruction set.
        threads: among which rows are shared out.

    Returns:
        float32 [..., columns], without gradient.

    Raises:
        ValueError: x has another number of columns.
    """
    columns = rotation.columns
    if x.shape[-1] != columns:
        raise ValueError(f"the rotation has {columns} columns, but there are {x.shape[-1]}")
    x = x.detach().float().contiguous()
    signs, rotated = rotation.sign_bits, torch.empty_like(x)

    def rotate_rows(first: int, last: int) -> None:
        source, target = (tensor.data_ptr() + first * columns * 4 for tensor in (x, rotated))
        loaded().edgerazor_rotate(
            isa % len(isas()), source, last - first, columns, rotation.block, signs.data_ptr(), back, target
        )

    shares = _shares(x.numel() // columns, threads)
    _share_out([functools.partial(rotate_rows, *share) for share in shares], threads)
    return rotated


def linear(
    x: QuantizedActivations,
    layout: RowLayout,
    parts: Sequence[FormatRows],
    bias: Tensor | None = None,
    isa: int = -1,
) -> Tensor:
    """`y = W x + bias`, float32 [tokens, out], for the matrix whose rows are those of all parts; bias float32 [out].

    Raises:
        ValueError: a part does not fit.
    """
    out = sum(part.count for part in parts)
    for part in parts:
        part.check(layout, out)
    y = torch.empty(len(x.codes), out)
    for part in parts:
        linear_blocks(x, layout, part, bias, y, 0, part.blocks, isa)
    return y


def linear_blocks(
    x: QuantizedActivations,
    layout: RowLayout,
    part: FormatRows,
    bias: Tensor | None,
    y: Tensor,
    first: int,
    last: int,
    isa: int = -1,
) -> None:
    """Computes row blocks `first` to `last` of a part into their columns of `y` [tokens, out], without any check.

    Threads may call it at the same time for different blocks; the interpreter's lock is free meanwhile.
    """
    inputs = [tensor.data_ptr() for tensor in (x.codes, x.scales, x.sums)]
    output = (None if bias is None else bias.data_ptr(), y.data_ptr(), y.stride(0), first, last)
    structure = ctypes.byref(part.structure())
    loaded().edgerazor_linear(layout.handle, isa % len(isas()), structure, len(x.codes), *inputs, *output)


def linear_float_blocks(
    x: Tensor,
    layout: RowLayout,
    part: FormatRows,
    bias: Tensor | None,
    y: Tensor,
    first: int,
    last: int,
    isa: int = -1,
) -> None:
    """`linear_blocks` for float32 activations: x contiguous float32 [tokens, columns]."""
    output = (None if bias is None else bias.data_ptr(), y.data_ptr(), y.stride(0), first, last)
    structure = ctypes.byref(part.structure())
    loaded().edgerazor_linear_float(layout.handle, isa % len(isas()), structure, len(x), x.data_ptr(), *output)


def least_error(
    number_format: Format, groups: Tensor, codes: Tensor | None = None, isa: int = -1, threads: int = 1
) -> Tensor:
    """The scales of least squared error, float16 [...], of groups float32 [..., group] on the CPU.

    For a format whose `rounding` is not None they equal those that PyTorch finds to the bit, whatever `isa` and
    `threads` are.

    Args:
        number_format: the format of the codes.
        groups: the weights.
        codes: contiguous int8 [..., group], to write the codes into.
        isa: number of the instruction set.
        threads: among which the groups are shared out.

    Raises:
        ValueError: a weight is not finite, or a tensor has another dtype, shape or device.
        MemoryError: there is not enough memory for one more group.
    """
    if groups.dtype != torch.float32 or groups.device.type != "cpu" or not groups.dim() or not groups.shape[-1]:
        raise ValueError(f"groups must be float32 on the CPU, not empty, got {groups.dtype} {list(groups.shape)}")
    if codes is not None and (codes.dtype != torch.int8 or codes.shape != groups.shape or not codes.is_contiguous()):
        raise ValueError(f"codes must be contiguous int8 {list(groups.shape)}, got {codes.dtype} {list(codes.shape)}")
    groups = groups.contiguous()
    scales = torch.empty(groups.shape[:-1], dtype=torch.float16)
    size, settings = groups.shape[-1], _scale_search(number_format)
    results: list[int] = []

    def search(first: int, last: int) -> None:
        weights = groups.data_ptr() + first * size * groups.itemsize
        outputs = (scales.data_ptr() + first * 2, None if codes is None else codes.data_ptr() + first * size)
        results.append(
            loaded().edgerazor_least_error(
                isa % len(isas()), ctypes.byref(settings), weights, last - first, size, *outputs
            )
        )

    _share_out([functools.partial(search, *share) for share in _shares(scales.numel(), threads)], threads)
    if min(results, default=-1) < -1:
        raise MemoryError("there is not enough memory to find scales")
    if max(results, default=-1) >= 0:
        raise ValueError("a weight is not finite")
    return scales


@cache
def _scale_search(number_format: Format) -> ScaleSearchStructure:
    """The settings of the format's search for the library."""
    grid = number_format.grid
    return ScaleSearchStructure(
        (c_float * len(grid.multiples))(*grid.multiples),
        len(grid.multiples),
        grid.refinements,
        grid.rms_factor,
        absmax_units(number_format),
        number_format.min_code,
        number_format.max_code,
        number_format.rounding == "middle",
    )


def round_weights(
    w: Tensor, scales: Tensor, spec: MatrixSpec, dtype: torch.dtype, isa: int = -1, threads: int = 1
) -> Tensor:
    """The dequantized weight [rows, columns] with given scales, as `formats.quantize_dequantize` to the bit.

    Args:
        w: contiguous float32 [rows, columns] on the CPU.
        scales: float32 [rows, groups] that fp16 holds, none of them negative.
        spec: formats of the rows, whose `rounding` is not None.
        dtype: float32 or bfloat16.
        isa: number of the instruction set.
        threads: among which the rows are shared out.

    Raises:
        ValueError: a weight is not finite.
    """
    out, scales = torch.empty(w.shape, dtype=dtype), scales.contiguous()
    results: list[int] = []

    def rounded(number_format: Format, rows: WeightRowsStructure) -> None:
        arguments = (ctypes.byref(_code_range(number_format)), ctypes.byref(rows), dtype == torch.bfloat16)
        results.append(loaded().edgerazor_round_weights(isa % len(isas()), *arguments, out.data_ptr()))

    _for_format_rows(rounded, w, scales, spec, threads)
    if max(results, default=-1) >= 0:
        raise ValueError("a weight is not finite")
    return out


def learned_gradients(
    gradient: Tensor, w: Tensor, scales: Tensor, spec: MatrixSpec, isa: int = -1, threads: int = 1
) -> tuple[Tensor, Tensor]:
    """LSQ's gradients of the weight [rows, columns] and of its scales [rows, groups], both float32.

    They are those of `formats/core/lsq.py`, up to the order in which a group's products are added up.

    Args:
        gradient: of the rounded weight, float32 [rows, columns].
        w, scales, spec, isa, threads: as `round_weights` has them; scales are positive.
    """
    gradient, scales = gradient.contiguous(), scales.contiguous()
    to_w, to_scales = torch.empty_like(w), torch.empty_like(scales)

    def through(number_format: Format, rows: WeightRowsStructure) -> None:
        arguments = (ctypes.byref(_code_range(number_format)), ctypes.byref(rows), gradient.data_ptr())
        loaded().edgerazor_learned_gradients(isa % len(isas()), *arguments, to_w.data_ptr(), to_scales.data_ptr())

    _for_format_rows(through, w, scales, spec, threads)
    return to_w, to_scales


def _for_format_rows(
    function: Callable[[Format, WeightRowsStructure], None], w: Tensor, scales: Tensor, spec: MatrixSpec, threads: int
) -> None:
    """Call a function for the rows of each format, in shares that threads take."""
    group_size = min(spec.group_size, w.shape[1])
    numbers_by_format = [
        (number_format, torch.arange(len(w)) if rows is None else rows.cpu())
        for number_format, rows in spec.format_rows
    ]
    calls = []
    for number_format, numbers in numbers_by_format:
        for first, last in _shares(len(numbers), threads):
            selected = (numbers[first:].data_ptr(), last - first)
            rows = WeightRowsStructure(w.data_ptr(), scales.data_ptr(), *selected, w.shape[1], group_size)
            calls.append(functools.partial(function, number_format, rows))
    _share_out(calls, threads)


@cache
def _code_range(number_format: Format) -> CodeRangeStructure:
    """The codes of a format for the library."""
    middle = number_format.rounding == "middle"
    return CodeRangeStructure(number_format.min_code, number_format.max_code, middle)


def read(memory: Tensor) -> int:
    """Reads all 64-bit words of a contiguous tensor, to measure the bandwidth of memory; returns their exclusive or."""
    words: int = loaded().edgerazor_read(len(isas()) - 1, memory.data_ptr(), memory.nbytes // 8)
    return words


def dequantize_rows(layout: RowLayout, part: FormatRows, indices: Tensor) -> Tensor:
    """Weights float32 [n, columns] of the rows of a part with the indices int64 [n].

    Raises:
        ValueError: the part does not fit, or there is no such row.
    """
    part.check(layout)
    numbers = indices.tolist()
    if numbers and not 0 <= min(numbers) <= max(numbers) < part.count:
        raise ValueError(f"rows are between 0 and {part.count - 1}")
    weights = torch.empty(len(numbers), layout.columns)
    structure = ctypes.byref(part.structure())
    for index, row in zip(numbers, weights, strict=True):
        loaded().edgerazor_dequantize_row(layout.handle, structure, index, row.data_ptr())
    return weights


class Matrix:
    """A packed matrix in the layout in which it is stored: `reference.linear` and `.embedding` without unpacking it.

    Args:
        parts: tensors by name, as `formats.pack_matrix` returns them, in memory that stays.
        spec: the formats of its rows.
        shape: rows and columns.

    Raises:
        ValueError: the formats are those of blocks, or a part does not fit, or a scale is negative or not finite.
    """

    def __init__(self, parts: Mapping[str, Tensor], spec: MatrixSpec, shape: tuple[int, int]) -> None:
        if spec.block_formats is not None:
            raise ValueError("formats of blocks are for the reference to compute with")
        spec.check_shape(shape)
        if max(shape) > LARGEST:
            raise ValueError(f"a matrix cannot be {list(shape)}")
        self.out, self.columns = shape
        self.group_size = spec.group_size
        self.parts = []
        for number_format, rows in spec.format_rows:
            row_numbers = None if rows is None else rows.to(torch.int32)
            count = self.out if rows is None else len(rows)
            codes, scales = parts[number_format.name], parts[number_format.name + SCALES]
            self.parts.append(FormatRows.of(codes, scales, count, number_format, row_numbers))
        self._row_layouts: dict[int, RowLayout] = {}
        for part in self.parts:
            part.check(self.row_layout(self.group_size), self.out)
            if not torch.isfinite(part.scales).all() or torch.signbit(part.scales).any():
                raise ValueError("a scale is negative or not finite")

    def expanded(self) -> Matrix:
        """The same matrix with ternary codes in two bits each, for machines that compute faster with them."""
        other = copy.copy(self)
        layout = self.row_layout(self.group_size)
        other.parts = [expand_ternary(layout, part) if part.bits == 0 else part for part in self.parts]
        return other

    def row_layout(self, activation_group: int) -> RowLayout:
        """The layout of its rows for activations in groups of that size."""
        if activation_group not in self._row_layouts:
            self._row_layouts[activation_group] = RowLayout(self.columns, self.group_size, activation_group)
        return self._row_layouts[activation_group]

    def linear(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        activation_bits: int = 8,
        activation_group: int = 256,
        activation_scale: float | None = None,
        isa: int = -1,
        threads: int = 1,
    ) -> Tensor:
        """`y = W x + bias`, float32 [..., out].

        Arguments and errors are those of `reference.linear`, but there are at most 8 activation bits. The result does
        not depend on `isa`, the number of an instruction set, nor on `threads`.
        """
        tokens = self._tokens(x)
        layout = self.row_layout(activation_group if activation_scale is None else self.columns)
        scale = None if activation_scale is None else max(activation_scale, SMALLEST)
        quantized = quantize(tokens, layout, activation_bits, scale, isa)
        y = torch.empty(len(tokens), self.out)
        self._compute(functools.partial(linear_blocks, quantized, layout), bias, y, isa, threads)
        return y.reshape(*x.shape[:-1], self.out)

    def linear_float(self, x: Tensor, bias: Tensor | None = None, isa: int = -1, threads: int = 1) -> Tensor:
        """`linear` with float32 activations. Values of x that are not finite enter the sums.

        Results of different instruction sets differ by the rounding of float32 sums.
        """
        tokens = self._tokens(x).float().contiguous()
        y = torch.empty(len(tokens), self.out)
        layout = self.row_layout(self.columns)
        self._compute(functools.partial(linear_float_blocks, tokens, layout), bias, y, isa, threads)
        return y.reshape(*x.shape[:-1], self.out)

    def _tokens(self, x: Tensor) -> Tensor:
        """x as [tokens, columns]."""
        if x.shape[-1] != self.columns:
            raise ValueError(f"the matrix has {self.columns} columns, but its input has {x.shape[-1]} features")
        return x.reshape(-1, self.columns)

    def _compute(self, blocks: Callable[..., None], bias: Tensor | None, y: Tensor, isa: int, threads: int) -> None:
        """Calls blocks(part, bias, y, first block, last block, isa) for all row blocks, shared out among threads."""
        bias = None if bias is None else bias.float().contiguous()
        work = [
            functools.partial(blocks, part, bias, y, *share, isa)
            for part in self.parts
            for share in _shares(part.blocks, threads)
        ]
        _share_out(work, threads)

    def embedding(self, ids: Tensor) -> Tensor:
        """Rows of the matrix, float32 [..., columns], for ids int64 [...].

        Raises:
            ValueError: there is no such row.
        """
        flat = ids.flatten()
        if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < self.out:
            raise ValueError(f"rows are between 0 and {self.out - 1}")
        embedded = torch.empty(len(flat), self.columns)
        for part in self.parts:
            index = flat if part.rows is None else torch.searchsorted(part.rows, flat.to(torch.int32))
            in_part = index < part.count
            if part.rows is not None:
                in_part &= part.rows[index.clamp(max=part.count - 1)] == flat
            embedded[in_part] = dequantize_rows(self.row_layout(self.group_size), part, index[in_part])
        return embedded.reshape(*ids.shape, self.columns)


def _shares(blocks: int, threads: int) -> list[tuple[int, int]]:
    """Ranges of row blocks, one for each thread, in whole tiles."""
    cuts = sorted({min(blocks, -(-blocks * i // threads // TILE) * TILE) for i in range(threads + 1)})
    return list(pairwise(cuts))


def _share_out(work: Sequence[Callable[[], None]], threads: int) -> None:
    """Calls all functions, on up to so many threads, of which this one is the first."""
    waiting = iter(work)

    def help_out() -> None:
        for call in waiting:  # the interpreter's lock hands each call to one thread
            call()

    helpers = []
    for _ in range(min(threads, len(work)) - 1):
        try:
            helpers.append(_pool(threads - 1, os.getpid()).submit(help_out))
        except RuntimeError:  # the system has no more threads: those that there are do the work
            break
    help_out()
    for helper in helpers:
        helper.result()


@cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads that sleep between calls, so that they never compete with torch's; each process has its own."""
    return ThreadPoolExecutor(threads, "edgerazor")


def expand_ternary(layout: RowLayout, part: FormatRows, isa: int = -1) -> FormatRows:
    """Ternary rows with codes of two bits: a fourth more bytes, which take fewer steps to unpack.

    Raises:
        ValueError: the part does not fit.
    """
    part.check(layout)
    width = layout.block_bytes(2)
    codes = torch.empty(part.blocks, width, dtype=torch.uint8)
    loaded().edgerazor_expand_ternary(
        layout.handle, isa % len(isas()), part.codes.data_ptr(), part.blocks, codes.data_ptr()
    )
    return FormatRows(codes, part.scales, part.count, 2, -2, part.rows)
