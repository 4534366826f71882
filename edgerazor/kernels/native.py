"""The library of kernels, through ctypes: products with the parts of a packed matrix as they are stored.

What the library computes is `reference.linear`, to the bit: the same integer sums, and the same float32 operations in
the same order, whatever the instruction set and however many tokens there are. (With activations as they are there are
no integer sums, and it is `reference.decoded_linear` up to the rounding of float32 sums.)
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
from edgerazor.formats import SCALES, SMALLEST, Format, MatrixSpec, absmax_units

#: Rows that lie side by side in memory; blocks of them that are computed side by side.
ROWS, TILE = 16, 4
#: Rows or columns of a matrix, and other sizes that the library takes: int32.
LARGEST = (1 << 31) - 1
NOT_BUILT = "the native library is not built"


class NotFiniteError(ValueError):
    """An activation is infinite or not a number."""


class PartStructure(ctypes.Structure):
    """`edgerazor_part` of `cpp/library.h`."""

    _fields_ = (
        ("codes", c_void_p),
        ("scales", c_void_p),
        ("rows", c_void_p),
        ("count", c_int64),
        ("bits", c_int32),
        ("lowest", c_int32),
    )


class LadderStructure(ctypes.Structure):
    """`edgerazor_ladder` of `cpp/library.h`."""

    _fields_ = (
        ("shares", POINTER(c_float)),
        ("count", c_int32),
        ("refinements", c_int32),
        ("spread", c_float),
        ("reaching", c_float),
        ("lowest", c_float),
        ("highest", c_float),
        ("middle", c_int32),
    )


_SIGNATURES = {
    "edgerazor_isa_count": (c_int, []),
    "edgerazor_isa_name": (c_char_p, [c_int]),
    "edgerazor_geometry_new": (c_void_p, [c_int32, c_int32, c_int32]),
    "edgerazor_geometry_free": (None, [c_void_p]),
    "edgerazor_activation_bytes": (c_int64, [c_void_p]),
    "edgerazor_segments": (c_int64, [c_void_p]),
    "edgerazor_block_bytes": (c_int64, [c_void_p, c_int32]),
    "edgerazor_quantize": (c_int64, [c_void_p, c_int, c_void_p, c_int64, c_int32, c_float, *[c_void_p] * 3]),
    "edgerazor_linear": (
        None,
        [c_void_p, c_int, POINTER(PartStructure), c_int64, *[c_void_p] * 5, c_int64, c_int64, c_int64],
    ),
    "edgerazor_linear_float": (
        None,
        [c_void_p, c_int, POINTER(PartStructure), c_int64, *[c_void_p] * 3, c_int64, c_int64, c_int64],
    ),
    "edgerazor_row": (None, [c_void_p, POINTER(PartStructure), c_int64, c_void_p]),
    "edgerazor_expand_ternary": (None, [c_void_p, c_int, c_void_p, c_int64, c_void_p]),
    "edgerazor_least_error": (c_int64, [c_int, POINTER(LadderStructure), c_void_p, c_int64, c_int64, *[c_void_p] * 2]),
    "edgerazor_read": (c_uint64, [c_int, c_void_p, c_int64]),
}


def library() -> ctypes.CDLL | None:
    """The library, or None where there is none to use; `missing` says why."""
    return _opened()[0]


def missing() -> str:
    """Why `library` gives none: what can end a sentence about it."""
    return _opened()[1] or NOT_BUILT


@cache
def _opened() -> tuple[ctypes.CDLL | None, str]:
    """The library, or what is wrong: calling a damaged one, or one built from other sources, could do anything."""
    from edgerazor.kernels import build  # which may be the program that runs: no import of the package imports it

    path = Path(__file__).with_name(build.LIBRARY)
    try:
        if not path.exists():
            return None, NOT_BUILT
        if problem := build.problem(path.read_bytes()):
            return None, f"the native library {path} {problem}"
        found = ctypes.CDLL(str(path))
        fingerprint = build.fingerprint()
    except OSError as error:
        return None, f"the native library {path} cannot be loaded ({plain(error)})"
    sources = getattr(found, "edgerazor_sources", None)
    if sources is not None:
        sources.restype, sources.argtypes = c_char_p, []
    if sources is None or sources().decode() != fingerprint:
        return None, "the native library was built from other sources"
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    return found, ""


def loaded() -> ctypes.CDLL:
    """The library.

    Raises:
        RuntimeError: there is none.
    """
    found = library()
    if found is None:
        raise RuntimeError(f"{missing()}: run python -m edgerazor.kernels.build")
    return found


@cache
def isas() -> tuple[str, ...]:
    """Names of the instruction sets that this machine can run, the best one last; none without the library."""
    found = library()
    if found is None:
        return ()
    return tuple(found.edgerazor_isa_name(i).decode() for i in range(found.edgerazor_isa_count()))


class Geometry:
    """How the rows of matrices of `columns` columns are cut, for groups of weights and of activations."""

    def __init__(self, columns: int, group_size: int, activation_group: int) -> None:
        if min(columns, group_size, activation_group) < 1:
            raise ValueError(f"columns and groups must be at least 1: {columns}, {group_size}, {activation_group}")
        if columns > LARGEST:
            raise ValueError(f"there are no matrices of {columns} columns")
        self.columns = columns
        self.groups = -(-columns // group_size)
        sizes = (min(each, columns) for each in (group_size, activation_group))
        self.handle = c_void_p(loaded().edgerazor_geometry_new(columns, *sizes))
        if not self.handle:
            raise MemoryError("there is not enough memory for a matrix")
        self.activation_bytes: int = loaded().edgerazor_activation_bytes(self.handle)
        self.segments: int = loaded().edgerazor_segments(self.handle)
        weakref.finalize(self, loaded().edgerazor_geometry_free, self.handle)

    def block_bytes(self, bits: int) -> int:
        """Bytes of a block of 16 rows of codes; bits 0 is ternary."""
        found: int = loaded().edgerazor_block_bytes(self.handle, bits)
        return found


@dataclass(frozen=True, eq=False)
class Part:
    """The rows of a matrix that have one format, as they are stored.

    Attributes:
        codes: uint8 [row blocks, bytes of a block].
        scales: float16 [row blocks, groups, 16].
        count: rows.
        bits: 0 for ternary (base 3), else 1 to 8.
        lowest: twice the level of the lowest code.
        rows: int32 [count], the place of each row in the matrix; None when these are all its rows.
    """

    codes: Tensor
    scales: Tensor
    count: int
    bits: int
    lowest: int
    rows: Tensor | None = None

    @classmethod
    def of(cls, codes: Tensor, scales: Tensor, count: int, number_format: Format, rows: Tensor | None = None) -> Part:
        """A part in the bytes of that format."""
        bits = number_format.kernel_bits
        if bits is None:
            raise ValueError(f"native kernels cannot read codes of {number_format.name}")
        lowest = -1 if bits == 0 else -(1 << (bits - 1))
        level = number_format.level_(torch.tensor([float(lowest)]))
        return cls(codes, scales, count, bits, round(2 * float(level)), rows)

    @property
    def blocks(self) -> int:
        """Blocks of 16 rows."""
        return -(-self.count // ROWS)

    def check(self, geometry: Geometry, out: int | None = None) -> None:
        """ValueError unless tensors have the dtypes and shapes that the geometry asks for, and rows are below `out`."""
        width = geometry.block_bytes(self.bits)
        wanted = [
            ("codes", self.codes, torch.uint8, (self.blocks, width)),
            ("scales", self.scales, torch.float16, (self.blocks, geometry.groups, ROWS)),
        ]
        if self.rows is not None:
            wanted.append(("rows", self.rows, torch.int32, (self.count,)))
        for name, tensor, dtype, shape in wanted:
            if tensor.dtype != dtype or tuple(tensor.shape) != shape or not tensor.is_contiguous():
                found = f"{tensor.dtype} {list(tensor.shape)}"
                raise ValueError(f"{name} must be contiguous {dtype} {list(shape)}, got {found}")
        if (
            self.rows is not None
            and out is not None
            and self.count
            and not 0 <= self.rows.min() <= self.rows.max() < out
        ):
            raise ValueError(f"the places of rows must be between 0 and {out - 1}")

    def structure(self) -> PartStructure:
        """The part for the library; valid while this object lives."""
        rows = None if self.rows is None else self.rows.data_ptr()
        return PartStructure(self.codes.data_ptr(), self.scales.data_ptr(), rows, self.count, self.bits, self.lowest)


@dataclass(frozen=True, eq=False)
class Activations:
    """Quantized activations: codes int8 [tokens, bytes], scales float32 and sums int32 [tokens, segments]."""

    codes: Tensor
    scales: Tensor
    sums: Tensor


def quantize(x: Tensor, geometry: Geometry, bits: int = 8, scale: float | None = None, isa: int = -1) -> Activations:
    """Activations float32 [tokens, columns] as products with such matrices take them.

    Raises:
        NotFiniteError: a value is infinite or not a number.
        ValueError: the bits are not 2 to 8, or x has another number of features.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"activations are quantized to 2 to 8 bits, not {bits}")
    if x.shape[1] != geometry.columns:
        raise ValueError(f"the matrix has {geometry.columns} columns, but its input has {x.shape[1]} features")
    x = x.float().contiguous()
    codes = torch.empty(len(x), geometry.activation_bytes, dtype=torch.int8)
    scales = torch.empty(len(x), geometry.segments)
    sums = torch.empty(len(x), geometry.segments, dtype=torch.int32)
    pointers = (codes.data_ptr(), scales.data_ptr(), sums.data_ptr())
    wrong = loaded().edgerazor_quantize(
        geometry.handle, isa % len(isas()), x.data_ptr(), len(x), bits, scale or 0.0, *pointers
    )
    if wrong >= 0:
        raise NotFiniteError("an activation is not finite")
    return Activations(codes, scales, sums)


def linear(
    x: Activations,
    geometry: Geometry,
    parts: Sequence[Part],
    bias: Tensor | None = None,
    isa: int = -1,
) -> Tensor:
    """`y = W x + bias`, float32 [tokens, out], of the matrix that the parts make up; bias float32 [out]."""
    out = sum(part.count for part in parts)
    for part in parts:
        part.check(geometry, out)
    y = torch.empty(len(x.codes), out)
    for part in parts:
        product(x, geometry, part, bias, y, 0, part.blocks, isa)
    return y


def product(
    x: Activations, geometry: Geometry, part: Part, bias: Tensor | None, y: Tensor, first: int, last: int, isa: int = -1
) -> None:
    """The rows of `y` [tokens, out] that row blocks `first` to `last` of a part make, without checking anything.

    Threads may call it at the same time for different blocks; the interpreter's lock is free meanwhile.
    """
    inputs = [each.data_ptr() for each in (x.codes, x.scales, x.sums)]
    output = (None if bias is None else bias.data_ptr(), y.data_ptr(), y.stride(0), first, last)
    structure = ctypes.byref(part.structure())
    loaded().edgerazor_linear(geometry.handle, isa % len(isas()), structure, len(x.codes), *inputs, *output)


def float_product(
    x: Tensor, geometry: Geometry, part: Part, bias: Tensor | None, y: Tensor, first: int, last: int, isa: int = -1
) -> None:
    """`product` with activations as they are: x contiguous float32 [tokens, columns]."""
    output = (None if bias is None else bias.data_ptr(), y.data_ptr(), y.stride(0), first, last)
    structure = ctypes.byref(part.structure())
    loaded().edgerazor_linear_float(geometry.handle, isa % len(isas()), structure, len(x), x.data_ptr(), *output)


def least_error(
    number_format: Format, groups: Tensor, codes: Tensor | None = None, isa: int = -1, threads: int = 1
) -> Tensor:
    """The scales of least squared error, float16 [...], of groups float32 [..., group] on the CPU.

    To the bit what PyTorch finds for a format whose `rounding` is not None; `isa` and `threads` do not show.

    Args:
        number_format: whose scales.
        groups: the weights.
        codes: contiguous int8 [..., group], to write the codes into.
        isa: number of the instruction set.
        threads: that share the groups.

    Raises:
        ValueError: a weight is not finite, or a tensor is not as said here.
        MemoryError: there is not enough memory for one more group.
    """
    if groups.dtype != torch.float32 or groups.device.type != "cpu" or not groups.dim() or not groups.shape[-1]:
        raise ValueError(f"groups must be float32 on the CPU, not empty, got {groups.dtype} {list(groups.shape)}")
    if codes is not None and (codes.dtype != torch.int8 or codes.shape != groups.shape or not codes.is_contiguous()):
        raise ValueError(f"codes must be contiguous int8 {list(groups.shape)}, got {codes.dtype} {list(codes.shape)}")
    groups = groups.contiguous()
    scales = torch.empty(groups.shape[:-1], dtype=torch.float16)
    size, ladder = groups.shape[-1], _ladder(number_format)
    found: list[int] = []

    def search(first: int, last: int) -> None:
        weights = groups.data_ptr() + first * size * groups.itemsize
        outputs = (scales.data_ptr() + first * 2, None if codes is None else codes.data_ptr() + first * size)
        found.append(
            loaded().edgerazor_least_error(
                isa % len(isas()), ctypes.byref(ladder), weights, last - first, size, *outputs
            )
        )

    _share_out([functools.partial(search, *share) for share in _shares(scales.numel(), threads)], threads)
    if min(found, default=-1) < -1:
        raise MemoryError("there is not enough memory to find scales")
    if max(found, default=-1) >= 0:
        raise ValueError("a weight is not finite")
    return scales


@cache
def _ladder(number_format: Format) -> LadderStructure:
    """The format's for the library."""
    grid = number_format.grid
    return LadderStructure(
        (c_float * len(grid.multiples))(*grid.multiples),
        len(grid.multiples),
        grid.refinements,
        grid.rms_factor,
        absmax_units(number_format),
        number_format.min_code,
        number_format.max_code,
        number_format.rounding == "middle",
    )


def read(memory: Tensor) -> int:
    """Reads a contiguous tensor's 64-bit words once, to measure the bandwidth of memory; gives their exclusive or."""
    found: int = loaded().edgerazor_read(len(isas()) - 1, memory.data_ptr(), memory.nbytes // 8)
    return found


def rows(geometry: Geometry, part: Part, indices: Tensor) -> Tensor:
    """Decoded weights float32 [n, columns] of the rows of a part with those indices, int64 [n].

    Raises:
        ValueError: there is no such row.
    """
    part.check(geometry)
    wanted = indices.tolist()
    if wanted and not 0 <= min(wanted) <= max(wanted) < part.count:
        raise ValueError(f"rows are between 0 and {part.count - 1}")
    weights = torch.empty(len(wanted), geometry.columns)
    structure = ctypes.byref(part.structure())
    for index, place in zip(wanted, weights, strict=True):
        loaded().edgerazor_row(geometry.handle, structure, index, place.data_ptr())
    return weights


class Matrix:
    """A packed matrix as it is stored, to multiply by: `reference.linear` and `reference.embedding` without decoding.

    Args:
        parts: what `formats.pack_matrix` gives, in memory that stays.
        spec: its formats, which must be those of rows.
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
            places = None if rows is None else rows.to(torch.int32)
            count = self.out if rows is None else len(rows)
            codes, scales = parts[number_format.name], parts[number_format.name + SCALES]
            self.parts.append(Part.of(codes, scales, count, number_format, places))
        self._geometries: dict[int, Geometry] = {}
        for part in self.parts:
            part.check(self.geometry(self.group_size), self.out)
            if not torch.isfinite(part.scales).all() or torch.signbit(part.scales).any():
                raise ValueError("a scale is negative or not finite")

    def expanded(self) -> Matrix:
        """The same matrix with ternary codes of two bits, for machines that compute faster with them."""
        other = copy.copy(self)
        geometry = self.geometry(self.group_size)
        other.parts = [expand_ternary(geometry, part) if part.bits == 0 else part for part in self.parts]
        return other

    def geometry(self, activation_group: int) -> Geometry:
        """How its rows are cut for activations in groups of that size."""
        if activation_group not in self._geometries:
            self._geometries[activation_group] = Geometry(self.columns, self.group_size, activation_group)
        return self._geometries[activation_group]

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
        """`y = W x + bias`, float32 [..., out]; arguments and errors as of `reference.linear`, but at most 8 bits.

        The result does not depend on `isa`, the number of an instruction set, nor on `threads`.
        """
        tokens = self._tokens(x)
        geometry = self.geometry(activation_group if activation_scale is None else self.columns)
        scale = None if activation_scale is None else max(activation_scale, SMALLEST)
        quantized = quantize(tokens, geometry, activation_bits, scale, isa)
        y = torch.empty(len(tokens), self.out)
        self._multiply(functools.partial(product, quantized, geometry), bias, y, isa, threads)
        return y.reshape(*x.shape[:-1], self.out)

    def linear_float(self, x: Tensor, bias: Tensor | None = None, isa: int = -1, threads: int = 1) -> Tensor:
        """`linear` with activations as they are, in float32; what is not finite in x goes into the sums.

        The result depends on `isa` by the rounding of float32 sums.
        """
        tokens = self._tokens(x).float().contiguous()
        y = torch.empty(len(tokens), self.out)
        geometry = self.geometry(self.columns)
        self._multiply(functools.partial(float_product, tokens, geometry), bias, y, isa, threads)
        return y.reshape(*x.shape[:-1], self.out)

    def _tokens(self, x: Tensor) -> Tensor:
        """x as [tokens, columns]."""
        if x.shape[-1] != self.columns:
            raise ValueError(f"the matrix has {self.columns} columns, but its input has {x.shape[-1]} features")
        return x.reshape(-1, self.columns)

    def _multiply(self, multiply: Callable[..., None], bias: Tensor | None, y: Tensor, isa: int, threads: int) -> None:
        """Shares out multiply(part, bias, y, first block, last block, isa) of all parts among threads."""
        bias = None if bias is None else bias.float().contiguous()
        work = [
            functools.partial(multiply, part, bias, y, *blocks, isa)
            for part in self.parts
            for blocks in _shares(part.blocks, threads)
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
        found = torch.empty(len(flat), self.columns)
        for part in self.parts:
            place = flat if part.rows is None else torch.searchsorted(part.rows, flat.to(torch.int32))
            of_part = place < part.count
            if part.rows is not None:
                of_part &= part.rows[place.clamp(max=part.count - 1)] == flat
            found[of_part] = rows(self.geometry(self.group_size), part, place[of_part])
        return found.reshape(*ids.shape, self.columns)


def _shares(blocks: int, threads: int) -> list[tuple[int, int]]:
    """Row blocks shared out among threads, in whole tiles of four."""
    cuts = sorted({min(blocks, -(-blocks * i // threads // TILE) * TILE) for i in range(threads + 1)})
    return list(pairwise(cuts))


def _share_out(work: Sequence[Callable[[], None]], threads: int) -> None:
    """Does everything, this thread its share."""
    waiting = iter(work)

    def help_out() -> None:
        for each in waiting:  # the interpreter's lock hands each of them to one thread
            each()

    others = []
    for _ in range(min(threads, len(work)) - 1):
        try:
            others.append(_pool(threads - 1, os.getpid()).submit(help_out))
        except RuntimeError:  # the system has no more threads: those that there are do it
            break
    help_out()
    for other in others:
        other.result()


@cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads that sleep between products, so that they never compete with torch's; a process has its own."""
    return ThreadPoolExecutor(threads, "edgerazor")


def expand_ternary(geometry: Geometry, part: Part, isa: int = -1) -> Part:
    """A ternary part with codes of two bits: a fourth more bytes, fewer steps to decode them."""
    part.check(geometry)
    width = geometry.block_bytes(2)
    codes = torch.empty(part.blocks, width, dtype=torch.uint8)
    loaded().edgerazor_expand_ternary(
        geometry.handle, isa % len(isas()), part.codes.data_ptr(), part.blocks, codes.data_ptr()
    )
    return Part(codes, part.scales, part.count, 2, -2, part.rows)
