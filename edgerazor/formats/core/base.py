"""What a number format is: weights to small integers, the integers to weights, and the integers to bytes.

A weight matrix is cut into *groups*: `group_size` consecutive weights of one row (the last group of a row may be
shorter). A group shares one *scale* `s`; each of its weights becomes a small integer *code* `q`, and is worth `s * q`
from then on. Storing a weight so costs a few bits instead of sixteen; choosing `s` and `q` well is the whole art:

    scale   s = fp16(search(group))          one number per group, the one of least squared error (`least_error.py`),
                                             or fp16(rule(group)), as published: 2*mean|w| for ternary
    encode  q = clip(round(w / s), lo, hi)   the nearest level that the format has
    decode  w' = s * q                       what the model computes with

Two laws hold for every format. *The scale is rounded to its stored type (fp16) before the codes are chosen*, so
training, which computes with `decode(encode(w))`, and the packed file hold the same numbers, bit for bit. *A group
whose fp16 scale is zero has only codes 0 and decodes to 0*, never NaN.

Rounding has no useful gradient, so training pretends that it is the identity on the way back: the straight-through
estimator (Bengio et al., arXiv 1308.3432), written once, below. A new format is a small subclass in a file of its own:
a rule for the scale and, where it is not plain rounding or plain bit fields, a rule for codes or bytes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from edgerazor.formats.core import layout
from edgerazor.formats.core.least_error import (
    LARGEST_SCALE,
    ScaleGrid,
    accelerated_search,
    exact_sum,
    reference_search,
)

#: Weights in a cache block: few enough that all passes over the block find it in the processor's cache.
BLOCK = 1 << 17
#: The same for codes that are packed: they are bytes, so a block may have more of them.
PACKED_BLOCK = 1 << 19


class Encoded(NamedTuple):
    """A matrix in a number format: `codes` int8 [rows, cols] and `scales` float16 [rows, groups]."""

    codes: Tensor
    scales: Tensor


def group_count(cols: int, group_size: int) -> int:
    """Number of groups in a row of `cols` weights, a shorter last one included."""
    return -(-cols // group_size)


class Format(ABC):
    """One number format. Stateless: the methods map tensors to tensors.

    Attributes:
        name: its name in recipes and files, which is that of its file.
        nominal_bits: bits a weight by the name's count, without scales (ternary is exactly 1.58).
        min_rule_code: the smallest code of weights whose scale follows from the format's published rule.
        max_code: the largest code.
        code_bits: width of a stored code, `code - min_code` as an unsigned number.
        grid: the scales that the search for the one of least squared error tries.
        rounding: how `round_to_code_` and `level_` work, for a search outside PyTorch: a code is the "nearest" level,
            or its level is the "middle" of the interval from it to the next code; None: in another way.
    """

    name: str
    nominal_bits: float
    min_rule_code: int
    max_code: int
    code_bits: int
    grid: ScaleGrid
    rounding: Literal["nearest", "middle"] | None = "nearest"

    # What a format decides ----------------------------------------------------------------------------------------

    @abstractmethod
    def scale_rule(self, groups: Tensor) -> Tensor:
        """The scale of each group by the published rule, before it is rounded to fp16.

        Args:
            groups: float32 [..., group].

        Returns:
            float32 or float64 [...]; not finite exactly where a weight of the group is not.
        """

    @property
    def min_code(self) -> int:
        """The smallest code that can be stored; a given scale may use it even where the rule's scale does not."""
        return self.min_rule_code

    @cached_property
    def max_level(self) -> float:
        """The level of the largest code, in units of the scale."""
        return float(self.level_(torch.tensor([float(self.max_code)])))

    @property
    def code_count(self) -> int:
        """How many codes can be stored."""
        return self.max_code - self.min_code + 1

    @property
    def kernel_bits(self) -> int | None:
        """How native kernels read the codes: in bit planes of so many bits, 0 for base 3; None where they cannot.

        They know the bit planes of `layout.py`, with codes from `-2^(b-1)` on and levels that are one scale apart.
        """
        in_planes = type(self).pack_quads is Format.pack_quads and type(self).chunk == Format.chunk
        known = in_planes and self.rounding is not None and self.min_code == -(1 << self.code_bits - 1)
        return self.code_bits if known else None

    def round_to_code_(self, ratios: Tensor, min_code: int) -> Tensor:
        """Codes from `min_code` on, still floating, of the ratios `w / s` (any shape), in place; ties to even."""
        return ratios.round_().clamp_(min_code, self.max_code)

    def level_(self, codes: Tensor) -> Tensor:
        """The level of each code in units of the scale (any floating dtype and shape), in place."""
        return codes

    # Weights <-> codes --------------------------------------------------------------------------------------------

    def encode(self, w: Tensor, group_size: int, scales: Tensor | None = None, published: bool = False) -> Encoded:
        """Codes and scales of a weight matrix; computed in float32, outside autocast.

        Args:
            w: any floating dtype [rows, cols].
            group_size: weights that share a scale; `cols` or more means whole rows.
            scales: use these, [rows, groups], rounded to fp16, and every code that can be stored, instead of those of
                least squared error.
            published: use those of the format's published rule instead, and the codes from `min_rule_code` on.

        Raises:
            ValueError: a weight or given scale is not finite, a given scale is negative, or a shape does not fit.
        """
        w, group, full = grouping(w.detach(), group_size)
        if scales is not None:
            scales = _checked_scales(w, group, scales)
        codes = torch.empty(w.shape, dtype=torch.int8, device=w.device)
        stored = torch.empty(w.shape[0], group_count(w.shape[1], group), dtype=torch.float16, device=w.device)
        for rows, cols, groups in cache_blocks(w, group, full):
            block_scales = None if scales is None else scales[rows, groups]
            block_codes, stored[rows, groups] = self._encode_block(
                w[rows, cols], groups.stop - groups.start, block_scales, published
            )
            codes[rows, cols] = block_codes.flatten(1)
        return Encoded(codes, stored)

    def decode(self, codes: Tensor, scales: Tensor, group_size: int) -> Tensor:
        """The weights that codes int8 [rows, cols] and scales float16 [rows, groups] stand for: float32 [rows, cols].

        Raises:
            ValueError: the shapes do not fit together.
        """
        _, group, full = grouping(codes, group_size)
        _check_scales_shape(codes.shape, group, scales)
        w = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
        for rows, cols, groups in cache_blocks(codes, group, full):
            grouped = codes[rows, cols].float().unflatten(1, (groups.stop - groups.start, -1))
            w[rows, cols] = self.decode_block_(grouped, scales[rows, groups]).flatten(1)
        return w

    def fake_quantize(self, w: Tensor, group_size: int, published: bool = False) -> Tensor:
        """`decode(encode(w))`, float32 [rows, cols], for training: the gradient passes to `w` unchanged.

        Raises:
            ValueError: as `encode`.
        """
        return straight_through(w, lambda w: self.quantize_dequantize(w, group_size, published=published))

    def quantize_dequantize(
        self,
        w: Tensor,
        group_size: int,
        dtype: torch.dtype = torch.float32,
        scales: Tensor | None = None,
        published: bool = False,
    ) -> Tensor:
        """`decode(encode(w))` [rows, cols], computed in float32 block by block and given in `dtype`."""
        w, group, full = grouping(w.detach(), group_size)
        if scales is not None:
            scales = _checked_scales(w, group, scales)
        decoded = torch.empty(w.shape, dtype=dtype, device=w.device)
        for rows, cols, groups in cache_blocks(w, group, full):
            block_scales = None if scales is None else scales[rows, groups]
            codes, stored = self._encode_block(w[rows, cols], groups.stop - groups.start, block_scales, published)
            # Adding turns -0.0 into 0.0: as integers, codes have one zero.
            codes = codes.float() if codes.dtype == torch.int8 else codes.add_(0.0)
            decoded[rows, cols] = self.decode_block_(codes, stored).flatten(1)
        return decoded

    def _encode_block(self, w: Tensor, groups: int, scales: Tensor | None, published: bool) -> tuple[Tensor, Tensor]:
        """`encode_block`, or the same with codes as int8 where a faster search gives scales and codes at once."""
        if scales is None and not published:
            grouped = w.float().unflatten(1, (groups, -1))
            codes = torch.empty(grouped.shape, dtype=torch.int8, device=w.device)
            searched = accelerated_search(self, grouped, codes)
            if searched is not None:
                return codes, searched
        return self.encode_block(w, groups, scales, published)

    def encode_block(
        self, w: Tensor, groups: int, scales: Tensor | None, published: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Codes and scales of one cache block by the definition.

        Args:
            w: any floating dtype [rows, cols], left as it is.
            groups: number of groups in a row, all of one size.
            scales, published: as for `encode`; scales are not checked.

        Returns:
            Codes as float32 [rows, groups, group], zeros of either sign, and scales as float16 [rows, groups].
        """
        with torch.autocast(w.device.type, enabled=False):
            grouped = w.to(torch.float32, copy=True).unflatten(1, (groups, -1))
            min_code = self.min_code
            if scales is None and published:
                scales, min_code = _to_fp16(self.scale_rule(grouped)), self.min_rule_code
            elif scales is None:
                scales = reference_search(self, grouped)
            # Dividing by infinity where the scale is zero makes every ratio, and so every code, zero.
            divisor = scales.float().masked_fill_(scales == 0, torch.inf)
            return self.round_to_code_(grouped.div_(divisor.unsqueeze(2)), min_code), scales

    def decode_block_(self, codes: Tensor, scales: Tensor) -> Tensor:
        """Weights float32 [rows, groups, group] of one block of codes as float32, which they overwrite."""
        return self.level_(codes).mul_(scales.float().unsqueeze(2))

    # Codes <-> bytes ----------------------------------------------------------------------------------------------

    #: Quads of a row that share vectors with each other and with no others (see `layout.py`).
    chunk = 8

    @property
    def offset(self) -> int:
        """What is added to a code to store it as an unsigned number."""
        return -self.min_code

    def vectors(self, quads: int) -> int:
        """Vectors of 64 bytes that `quads` quads of a row block fill."""
        whole, rest = divmod(quads, self.chunk)
        return whole * self.chunk_vectors(self.chunk) + self.chunk_vectors(rest)

    def chunk_vectors(self, quads: int) -> int:
        """Vectors of a chunk of that many quads."""
        return sum(layout.bit_plane_vectors(quads, width) for width in layout.bit_plane_widths(self.code_bits))

    def row_bytes(self, cols: int, group_size: int) -> int:
        """Bytes that the codes of one row of a full block take."""
        return self.vectors(layout.quad_count(cols, group_size)) * layout.VECTOR // layout.ROWS

    def packed_shape(self, rows: int, cols: int, group_size: int) -> tuple[int, int]:
        """Shape of packed codes: row blocks, and bytes of one."""
        return layout.row_blocks(rows), self.row_bytes(cols, group_size) * layout.ROWS

    def pack(self, codes: Tensor, group_size: int) -> Tensor:
        """Codes int8 [rows, cols] as bytes uint8 [row blocks, bytes of a block], laid out as `layout.py` says.

        Raises:
            ValueError: a code is out of the format's range.
        """
        self.check_codes(codes)
        shape = (codes.shape[0], codes.shape[1])
        packed = torch.empty(self.packed_shape(*shape, group_size), dtype=torch.uint8, device=codes.device)
        for rows, blocks in _row_blocks(shape):
            stored = codes[rows].view(torch.uint8) + self.offset
            words = layout.to_quads(stored, group_size, self.offset)
            whole = words.shape[1] - words.shape[1] % self.chunk
            chunks = [self.pack_quads(words[:, :whole].unflatten(1, (-1, self.chunk))).flatten(1, 2)] if whole else []
            if whole < words.shape[1]:
                chunks.append(self.pack_quads(words[:, whole:]))
            packed[blocks] = torch.cat(chunks, dim=1).flatten().view(torch.uint8).view(-1, packed.shape[1])
        return packed

    def unpack(self, packed: Tensor, shape: tuple[int, int], group_size: int) -> Tensor:
        """The inverse of `pack`: codes int8 [rows, cols] of that shape.

        Raises:
            ValueError: the shape does not fit, a code is out of range, or something that pads is not zero.
        """
        self.check_packed(packed, shape, group_size)
        codes = torch.empty(shape, dtype=torch.int8, device=packed.device)
        quads = layout.quad_count(shape[1], group_size)
        whole = quads // self.chunk
        for rows, blocks in _row_blocks(shape):
            block = packed[blocks]
            words = block.flatten().view(torch.int64).view(len(block), -1, layout.WORDS)
            split = whole * self.chunk_vectors(self.chunk)
            chunks = []
            if whole:
                chunked = words[:, :split].unflatten(1, (whole, -1))
                chunks.append(self.unpack_quads(chunked, self.chunk).flatten(1, 2))
            if quads % self.chunk:
                chunks.append(self.unpack_quads(words[:, split:], quads % self.chunk))
            height = min(rows.stop, shape[0]) - rows.start
            stored = layout.from_quads(torch.cat(chunks, dim=1), (height, shape[1]), group_size, self.offset)
            codes[rows] = stored.sub_(self.offset).view(torch.int8)
        self.check_codes(codes)
        return codes

    def pack_quads(self, words: Tensor) -> Tensor:
        """A chunk of quads, stored codes as words int64 [..., quads, 8], as vectors [..., chunk_vectors(quads), 8]."""
        shift, parts = 0, []
        for width in layout.bit_plane_widths(self.code_bits):
            parts.append(layout.pack_bit_plane(words, shift, width, self.offset))
            shift += width
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)

    def unpack_quads(self, packed: Tensor, quads: int) -> Tensor:
        """The inverse of `pack_quads`: vectors [..., chunk_vectors(quads), 8] as words [..., quads, 8].

        Raises:
            ValueError: something that pads is not zero.
        """
        words, shift, start = torch.zeros((), dtype=torch.int64, device=packed.device), 0, 0
        for width in layout.bit_plane_widths(self.code_bits):
            stop = start + layout.bit_plane_vectors(quads, width)
            fill = self.offset >> shift & ((1 << width) - 1)
            words = words | layout.unpack_bit_plane(packed[..., start:stop, :], quads, width, fill) << shift
            shift, start = shift + width, stop
        return words

    def check_codes(self, codes: Tensor) -> None:
        """ValueError unless `codes` is an int8 matrix of codes that the format has."""
        if codes.dtype != torch.int8 or codes.dim() != 2:
            raise ValueError(f"codes must be an int8 matrix, got {codes.dtype} with {codes.dim()} dimensions")
        if codes.numel():
            smallest, largest = codes.aminmax()
            if smallest < self.min_code or largest > self.max_code:
                raise ValueError(f"a code is outside the range of {self.name}, {self.min_code} to {self.max_code}")

    def check_packed(self, packed: Tensor, shape: tuple[int, int], group_size: int) -> None:
        """ValueError unless `packed` is a byte matrix of the shape that the packed codes of a matrix have."""
        expected = self.packed_shape(*shape, group_size)
        if packed.dtype != torch.uint8 or tuple(packed.shape) != expected:
            raise ValueError(
                f"packed {self.name} codes of a {list(shape)} matrix must be uint8 {list(expected)}, "
                f"got {packed.dtype} {list(packed.shape)}"
            )


# The straight-through estimator -----------------------------------------------------------------------------------


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.dtype = x.dtype
        return function(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.to(ctx.dtype), None


def straight_through(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """`function(x)`, exactly, whose gradient with respect to `x` is that of the identity (arXiv 1308.3432).

    (`x + (function(x) - x).detach()` is the usual way to write it; its two roundings change the value.)
    `function` keeps the shape and returns a new tensor.
    """
    return _StraightThrough.apply(x, function)


# Groups and blocks ------------------------------------------------------------------------------------------------


def grouping(matrix: Tensor, group_size: int) -> tuple[Tensor, int, int]:
    """The matrix, its group size (at most a row), and how many columns its whole groups cover."""
    if matrix.dim() != 2 or matrix.shape[1] == 0:
        raise ValueError(f"expected a matrix [rows, cols] with at least one column, got {list(matrix.shape)}")
    if group_size < 1:
        raise ValueError(f"the group size must be at least 1, got {group_size}")
    group = min(group_size, matrix.shape[1])
    return matrix, group, matrix.shape[1] - matrix.shape[1] % group


def block_rows(matrix: Tensor) -> int:
    """Rows of a cache block of a matrix: few on a CPU, all of them on an accelerator."""
    rows, cols = matrix.shape
    return max(1, BLOCK // cols if matrix.device.type == "cpu" else rows)


def _row_blocks(shape: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """Pieces of a matrix [rows, cols] that stay in the cache while they are packed, as (rows, row blocks)."""
    rows, cols = shape
    height = max(1, PACKED_BLOCK // max(1, cols) // layout.ROWS)
    for block in range(0, layout.row_blocks(rows), height):
        yield slice(block * layout.ROWS, (block + height) * layout.ROWS), slice(block, block + height)


def cache_blocks(matrix: Tensor, group: int, full: int) -> list[tuple[slice, slice, slice]]:
    """Cache blocks of a matrix as (rows, columns, groups): those of its whole groups, then of the shorter last ones."""
    rows, cols = matrix.shape
    height = block_rows(matrix)
    parts = [(slice(0, full), slice(0, full // group))]
    if full < cols:
        parts.append((slice(full, cols), slice(full // group, full // group + 1)))
    return [(slice(row, row + height), *part) for part in parts for row in range(0, rows, height)]


def absolute_sum(groups: Tensor) -> Tensor:
    """The sum of `|w|` of each group, float32 [..., group] to float64 [...].

    It is added up in float64, so that the order in which threads or vector units add does not show in fp16.
    """
    return exact_sum(groups.abs())


def _to_fp16(scale: Tensor) -> Tensor:
    """Ideal scales [rows, groups] rounded to float16, the largest finite one at most."""
    if not math.isfinite(scale.amax()):  # a NaN is the largest of all
        raise ValueError("a weight is not finite")
    return scale.float().clamp_(max=LARGEST_SCALE).half()


def _checked_scales(w: Tensor, group: int, scales: Tensor) -> Tensor:
    """Scales that the caller chose, checked, as float16 [rows, groups]."""
    _check_scales_shape(w.shape, group, scales)
    if not torch.isfinite(w).all():
        raise ValueError("a weight is not finite")
    if not torch.isfinite(scales).all() or (scales < 0).any():
        raise ValueError("a scale is negative or not finite")
    return scales.detach().float().clamp(max=LARGEST_SCALE).half()


def _check_scales_shape(shape: torch.Size, group: int, scales: Tensor) -> None:
    expected = (shape[0], group_count(shape[1], group))
    if tuple(scales.shape) != expected:
        raise ValueError(f"scales must be {list(expected)} for a {list(shape)} matrix, got {list(scales.shape)}")
