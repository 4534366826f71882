"""What a number format is: weights to small integers, the integers to weights, and the integers to bytes.

A weight matrix is cut into *groups*: `group_size` consecutive weights of one row (the last group of a row may be
shorter). A group shares one *scale* `s`; each of its weights becomes a small integer *code* `q`, and is worth `s * q`
from then on. Storing a weight so costs a few bits instead of sixteen; choosing `s` and `q` well is the whole art:

    scale   s = fp16(rule(group))            one number per group: 2*mean|w| for ternary, max|w|/7 for int4
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

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: Largest finite fp16 number: a scale is never stored as infinity.
LARGEST_SCALE = 65504.0

#: Weights worked on at a time: small enough that the passes over one block find it in the processor's cache.
BLOCK = 1 << 17


class Encoded(NamedTuple):
    """A matrix in a number format: `codes` int8 [rows, cols] and `scales` float16 [rows, groups]."""

    codes: Tensor
    scales: Tensor


def group_count(cols: int, group_size: int) -> int:
    """Groups in a row of `cols` weights, a shorter last one included."""
    return -(-cols // group_size)


class Format(ABC):
    """One number format. Stateless: the methods map tensors to tensors.

    Attributes:
        name: its name in recipes and files.
        nominal_bits: bits a weight by the name's count, without scales (ternary is exactly 1.58).
        minimum, maximum: the smallest and largest code of weights whose scale follows from the format's rule.
        code_bits: width of the two's-complement bit field that `pack` gives to a code.
    """

    name: str
    nominal_bits: float
    minimum: int
    maximum: int
    code_bits: int

    # What a format decides ----------------------------------------------------------------------------------------

    @abstractmethod
    def scale_rule(self, groups: Tensor) -> Tensor:
        """The ideal scale of each group, before it is rounded to fp16.

        Args:
            groups: float32 [..., group].

        Returns:
            float32 or float64 [...]; not finite exactly where a weight of the group is not.
        """

    @property
    def lowest(self) -> int:
        """The smallest code that can be stored; a given scale may use it even where the rule's scale does not."""
        return self.minimum

    def choose_(self, ratios: Tensor, smallest: int) -> Tensor:
        """Codes from `smallest` on, still floating, of the ratios `w / s` (any shape); works in place. Ties to even."""
        return ratios.round_().clamp_(smallest, self.maximum)

    def level_(self, codes: Tensor) -> Tensor:
        """The level of each code in units of the scale (any floating dtype and shape); works in place."""
        return codes

    # Weights <-> codes --------------------------------------------------------------------------------------------

    def encode(self, w: Tensor, group_size: int, scales: Tensor | None = None) -> Encoded:
        """Codes and scales of a weight matrix; computed in float32, outside autocast.

        Args:
            w: any floating dtype [rows, cols].
            group_size: weights that share a scale; `cols` or more means whole rows.
            scales: use these, [rows, groups], rounded to fp16, and every code that can be stored, instead of the
                format's rule.

        Raises:
            ValueError: a weight or given scale is not finite, a given scale is negative, or a shape does not fit.
        """
        w, group, full = _grouping(w.detach(), group_size)
        if scales is not None:
            scales = _given_scales(w, group, scales)
        codes = torch.empty(w.shape, dtype=torch.int8, device=w.device)
        stored = torch.empty(w.shape[0], group_count(w.shape[1], group), dtype=torch.float16, device=w.device)
        for rows, cols, groups in _blocks(w, group, full):
            given = None if scales is None else scales[rows, groups]
            chosen, stored[rows, groups] = self._encode(w[rows, cols], groups.stop - groups.start, given)
            codes[rows, cols] = chosen.flatten(1)
        return Encoded(codes, stored)

    def decode(self, codes: Tensor, scales: Tensor, group_size: int) -> Tensor:
        """The weights that codes int8 [rows, cols] and scales float16 [rows, groups] stand for: float32 [rows, cols].

        Raises:
            ValueError: the shapes do not fit together.
        """
        _, group, full = _grouping(codes, group_size)
        _check_scales_shape(codes.shape, group, scales)
        w = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
        for rows, cols, groups in _blocks(codes, group, full):
            grouped = codes[rows, cols].float().unflatten(1, (groups.stop - groups.start, -1))
            w[rows, cols] = self._decode_(grouped, scales[rows, groups]).flatten(1)
        return w

    def fake_quantize(self, w: Tensor, group_size: int) -> Tensor:
        """`decode(encode(w))`, float32 [rows, cols], for training: the gradient passes to `w` unchanged.

        Raises:
            ValueError: as `encode`.
        """
        return straight_through(w, lambda w: self.round_trip(w, group_size))

    def round_trip(
        self, w: Tensor, group_size: int, dtype: torch.dtype = torch.float32, scales: Tensor | None = None
    ) -> Tensor:
        """`decode(encode(w))` [rows, cols], computed in float32 block by block and given in `dtype`."""
        w, group, full = _grouping(w.detach(), group_size)
        if scales is not None:
            scales = _given_scales(w, group, scales)
        rounded = torch.empty(w.shape, dtype=dtype, device=w.device)
        for rows, cols, groups in _blocks(w, group, full):
            given = None if scales is None else scales[rows, groups]
            codes, stored = self._encode(w[rows, cols], groups.stop - groups.start, given)
            rounded[rows, cols] = self._decode_(codes, stored).flatten(1)
        return rounded

    def _encode(self, w: Tensor, groups: int, scales: Tensor | None) -> tuple[Tensor, Tensor]:
        """Codes as float32 [rows, groups, group] and scales as float16 [rows, groups] of one block, w [rows, cols]."""
        with torch.autocast(w.device.type, enabled=False):
            grouped = w.float().unflatten(1, (groups, -1))
            smallest = self.minimum if scales is None else self.lowest
            if scales is None:
                scales = _stored_scale(self.scale_rule(grouped))
            # Dividing by infinity where the scale is zero makes every ratio, and so every code, zero.
            divisor = scales.float().masked_fill_(scales == 0, torch.inf)
            codes = self.choose_(grouped / divisor.unsqueeze(2), smallest)
            return codes.add_(0.0), scales  # adding zero turns -0.0 into 0.0: as integers, codes have one zero

    def _decode_(self, codes: Tensor, scales: Tensor) -> Tensor:
        """Weights float32 [rows, groups, group] of one block of codes as float32, in place of them."""
        return self.level_(codes).mul_(scales.float().unsqueeze(2))

    # Codes <-> bytes ----------------------------------------------------------------------------------------------

    def packed_columns(self, cols: int) -> int:
        """Bytes of a packed row of `cols` codes."""
        return -(-cols * self.code_bits // 8)

    def pack(self, codes: Tensor) -> Tensor:
        """Codes int8 [rows, cols] as bytes uint8 [rows, packed_columns(cols)].

        Code `i` of a row is the two's-complement field of bits `i * code_bits` onwards of the row's bytes, low bits
        first (so int4 has its first code in the low nibble); the unused bits of the last byte are zero.

        Raises:
            ValueError: a code is out of the format's range.
        """
        self.check_codes(codes)
        cols = codes.shape[1]
        fields = torch.nn.functional.pad(codes, (0, -cols % 8)).unflatten(1, (-1, 8))  # eight codes fill whole bytes
        words = torch.zeros(fields.shape[:2], dtype=torch.int64, device=codes.device)
        for i in range(8):
            words |= (fields[..., i].long() & self._mask) << (i * self.code_bits)
        octets = [(words >> (8 * j) & 255).to(torch.uint8) for j in range(self.code_bits)]
        return torch.stack(octets, dim=2).flatten(1)[:, : self.packed_columns(cols)].contiguous()

    def unpack(self, packed: Tensor, cols: int) -> Tensor:
        """The inverse of `pack`: bytes uint8 [rows, packed_columns(cols)] as codes int8 [rows, cols].

        Raises:
            ValueError: the shape does not fit, a code is out of range, or the unused bits are not zero.
        """
        self.check_packed(packed, cols)
        octets = torch.nn.functional.pad(packed, (0, -packed.shape[1] % self.code_bits)).unflatten(
            1, (-1, self.code_bits)
        )
        words = torch.zeros(octets.shape[:2], dtype=torch.int64, device=packed.device)
        for j in range(self.code_bits):
            words |= octets[..., j].long() << (8 * j)
        sign = 1 << (self.code_bits - 1)
        fields = [(((words >> (i * self.code_bits) & self._mask) ^ sign) - sign).to(torch.int8) for i in range(8)]
        codes = torch.stack(fields, dim=2).flatten(1)
        if codes[:, cols:].any():
            raise ValueError(f"the unused bits at the end of a packed {self.name} row are not zero")
        codes = codes[:, :cols].contiguous()
        self.check_codes(codes)
        return codes

    @property
    def _mask(self) -> int:
        return (1 << self.code_bits) - 1

    def check_codes(self, codes: Tensor) -> None:
        """ValueError unless `codes` is an int8 matrix of codes that the format has."""
        if codes.dtype != torch.int8 or codes.dim() != 2:
            raise ValueError(f"codes must be an int8 matrix, got {codes.dtype} with {codes.dim()} dimensions")
        if codes.numel() and (codes.min() < self.lowest or codes.max() > self.maximum):
            raise ValueError(f"a code is outside the range of {self.name}, {self.lowest} to {self.maximum}")

    def check_packed(self, packed: Tensor, cols: int) -> None:
        """ValueError unless `packed` is a byte matrix of the width that `cols` codes take."""
        if packed.dtype != torch.uint8 or packed.dim() != 2 or packed.shape[1] != self.packed_columns(cols):
            raise ValueError(
                f"packed {self.name} rows of {cols} codes must be uint8 with {self.packed_columns(cols)} bytes each, "
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


def _grouping(matrix: Tensor, group_size: int) -> tuple[Tensor, int, int]:
    """The matrix, its group size (at most a row) and how many columns whole groups fill."""
    if matrix.dim() != 2 or matrix.shape[1] == 0:
        raise ValueError(f"expected a matrix [rows, cols] with at least one column, got {list(matrix.shape)}")
    if group_size < 1:
        raise ValueError(f"the group size must be at least 1, got {group_size}")
    group = min(group_size, matrix.shape[1])
    return matrix, group, matrix.shape[1] - matrix.shape[1] % group


def block_rows(matrix: Tensor) -> int:
    """Rows of a matrix to work on at a time: few on a processor with caches, all on an accelerator."""
    rows, cols = matrix.shape
    return max(1, BLOCK // cols if matrix.device.type == "cpu" else rows)


def _blocks(matrix: Tensor, group: int, full: int) -> list[tuple[slice, slice, slice]]:
    """Blocks of a matrix as (rows, columns, groups): some rows of its whole groups, then some of its shorter ones."""
    rows, cols = matrix.shape
    height = block_rows(matrix)
    parts = [(slice(0, full), slice(0, full // group))]
    if full < cols:
        parts.append((slice(full, cols), slice(full // group, full // group + 1)))
    return [(slice(row, row + height), *part) for part in parts for row in range(0, rows, height)]


def _stored_scale(scale: Tensor) -> Tensor:
    """Round ideal scales [rows, groups] to float16."""
    if not torch.isfinite(scale).all():
        raise ValueError("a weight is not finite")
    return scale.float().clamp_(max=LARGEST_SCALE).half()


def _given_scales(w: Tensor, group: int, scales: Tensor) -> Tensor:
    """Scales that the caller chose, as float16 [rows, groups]."""
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
