"""Our codes as the integers of other programs: `weight = integer * scale`, one scale for each group of a row.

Most formats are that already. `int2` has half levels, so its integers are the odd numbers `2 * code + 1` at half the
scale. Rows and blocks of different formats simply have integers of different ranges. Nothing is rounded: what has no
such integers is refused with `UnfitError`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from edgerazor import formats
from edgerazor.formats import Encoded, Format, MatrixSpec, group_count

#: Below this a scale for each group costs more than the codes, and no kernel of others takes such groups.
SMALLEST_GROUP = 16


class UnfitError(ValueError):
    """A matrix cannot be held exactly; the reason, and what to do about it."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.reason, self.remedy = reason, remedy


class Integers(NamedTuple):
    """A matrix: `values` int8 [rows, cols] and `scales` float16 [rows, groups of `group_size` columns]."""

    values: Tensor
    scales: Tensor
    group_size: int

    def decoded(self) -> Tensor:
        """The weights, float32 [rows, cols]."""
        of_columns = self.scales.float().repeat_interleave(self.group_size, dim=1)[:, : self.values.shape[1]]
        return self.values.float() * of_columns


def _factor(number_format: Format) -> int:
    """1 where the levels of a format are integers, 2 where they are multiples of one half."""
    codes = torch.arange(number_format.min_code, number_format.max_code + 1).float()
    return 1 if bool((number_format.level_(codes) % 1 == 0).all()) else 2


def bits(names: Iterable[str]) -> int:
    """The fewest bits of two's-complement integers that hold every code of the named formats."""
    needed = 2
    for number_format in map(formats.get, names):
        ends = torch.tensor([number_format.min_code, number_format.max_code], dtype=torch.float32)
        low, high = (number_format.level_(ends) * _factor(number_format)).tolist()
        needed = max(needed, math.ceil(math.log2(max(-low, high + 1))) + 1)
    return needed


def integers(encoded: Encoded, spec: MatrixSpec) -> Integers:
    """The integers and scales of a matrix, which decode to exactly the same weights.

    Args:
        encoded: codes int8 [rows, cols] and scales float16 [rows, groups].
        spec: formats of its rows or blocks, of any kind.

    Raises:
        UnfitError: half of a scale of a format with half levels is no float16 number.
    """
    codes, scales = encoded
    halved = _halved(spec, codes.shape, scales.shape)
    if not bool(halved.any()):
        return Integers(codes, scales, min(spec.group_size, codes.shape[1]))
    halves = torch.where(halved, scales / 2, scales)
    if not torch.equal(torch.where(halved, halves * 2, halves), scales):
        raise UnfitError(
            "half of its smallest scale is no float16 number", "leave formats without a zero level (int2) out"
        )
    of_columns = halved[:, torch.arange(codes.shape[1]) // spec.group_size]
    return Integers(torch.where(of_columns, 2 * codes + 1, codes), halves, min(spec.group_size, codes.shape[1]))


def _halved(spec: MatrixSpec, shape: torch.Size, groups: torch.Size) -> Tensor:
    """Bool [rows, groups]: which groups have a format with half levels."""
    halved = torch.zeros(groups, dtype=torch.bool)
    for view in spec.block_views(shape):
        mask = torch.zeros(view.rows, group_count(view.width, view.spec.group_size), dtype=torch.bool)
        for number_format, rows in view.spec.format_rows:
            mask[slice(None) if rows is None else rows] = _factor(number_format) == 2
        halved[:, view.groups] = mask.reshape(groups[0], -1)
    return halved


def common_group(columns: int, group_size: int, known: Sequence[int]) -> int:
    """The group size that a matrix gets where groups must divide the columns, and programs know only some sizes.

    Args:
        columns: of the matrix.
        group_size: in which its scales are.
        known: sizes that other programs have kernels for, the preferred first.

    Returns:
        the first known size that divides both; where none does, the largest number that does; `columns` for one scale
        a row. Each of our groups is some whole ones of these, with the same scale.

    Raises:
        UnfitError: only a very small number divides both.
    """
    if group_size >= columns:
        return columns
    common = math.gcd(columns, group_size)
    if common < SMALLEST_GROUP:
        raise UnfitError(
            f"its rows of {columns} weights are no whole groups of {group_size}",
            f"pack with a --group-size that divides {columns}, or `--group-size row`",
        )
    return next((size for size in known if common % size == 0), common)


def regrouped(matrix: Integers, group_size: int) -> Integers:
    """The same weights with scales for smaller groups, `group_size` columns each, that fill ours.

    Raises:
        ValueError: they do not.
    """
    columns = matrix.values.shape[1]
    if matrix.group_size < columns and matrix.group_size % group_size:
        raise ValueError(f"groups of {group_size} do not fill groups of {matrix.group_size}")
    starts = torch.arange(0, columns, group_size)
    return Integers(matrix.values, matrix.scales[:, starts // matrix.group_size].contiguous(), group_size)


def words(values: Tensor, width: int) -> Tensor:
    """Integers in rows as one stream of bits a row, in 32-bit words.

    Args:
        values: any integer dtype [rows, n], each 0 to 2^width - 1.
        width: bits of each.

    Returns:
        int32 [rows, ceil(n * width / 32)]: number i has the bits width*i and up of the row, low bits and words first.
        The last word is filled with zeros.
    """
    rows, count = values.shape
    fields = torch.nn.functional.pad(values, (0, -count % 32)).unflatten(1, (-1, 32))  # 32 fields fill whole words
    packed = torch.zeros(rows, fields.shape[1], width, dtype=torch.int64)
    for i in range(32):
        word, shift = divmod(i * width, 32)
        field = fields[..., i].long()
        packed[..., word] |= field << shift & 0xFFFFFFFF
        if shift + width > 32:
            packed[..., word + 1] |= field >> (32 - shift)
    signed = (packed ^ 0x80000000) - 0x80000000
    return signed.to(torch.int32).flatten(1)[:, : -(-count * width // 32)].contiguous()
