"""Codes as bytes that a coder of single bytes (Huffman's, in zstd) brings close to their entropy.

Huffman's code gives a byte a whole number of bits. That wastes least where no byte is frequent: one that is half of
all should take one bit and does, but one that is nine tenths of all should take 0.15 and takes one as well. What is
frequent also repeats by chance, and zstd points at each repetition, which costs more than it saves. So codes are put
into bytes in one of two ways, and the first byte of the stream says in which:

- *Digits* (first byte `k`, 1 to 4): `k` codes of a row to a byte, `code - min_code` as digits in the base that is the
  number of codes, the first the lowest; each row begins with a new byte, and zeros fill its last one. Such a byte has
  the entropy of its codes, since neighbours tell nothing, and equal rows stay equal.
- *Runs* (first bytes 0 and `longest`), where so many codes are 0 that most bytes of digits would be: all rows one
  behind the other, and one code more, 1, at the end. Byte 0 is `longest` codes 0, byte `1 + longest * i + r` is `r`
  codes 0, fewer than `longest`, and then the i-th of the other codes, the smallest first (1, -1, 2, -2, ...). These
  words are a complete code of their own, so the entropy of the bytes is again that of the codes, at any `longest`.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor

from edgerazor.formats.core.base import BLOCK, Format, block_rows
from edgerazor.formats.core.indices import index_bits

#: More zero bytes of digits than this share, and runs take fewer bits.
_SPARSE = 1 / 4
#: The longest run is as long as one of zeros alone with this probability: the bytes are then about equally frequent.
_RARE = 1 / 8
#: Up to so many codes, the table of Huffman's code counts: what is smallest is to be tried out, with at least this
#: share of zero bytes.
_SMALL, _MAYBE_SPARSE = 1 << 17, 1 / 8
#: Up to so many, it counts so much that fewer digits to a byte may be better.
_TINY, _MAYBE_SPARSE_IF_TINY = 1 << 15, 1 / 32
#: Bytes that say how a stream is made, at most, and the code behind the last one.
EXTRA = 3
_DTYPES = {1: torch.int8, 2: torch.int16, 4: torch.int32}


def code_ways(codes: Tensor, number_format: Format) -> list[Tensor]:
    """Streams uint8 [n] that hold the codes int8 [rows, cols]: the best one of many codes, or some of few.

    Raises:
        ValueError: a code is out of the format's range.
    """
    number_format.check_codes(codes)
    most, longest = _most_digits(number_format), _longest_run(codes, number_format)
    zero_bytes = _zeros(codes) ** most if longest > 1 else 0
    small, tiny = codes.numel() <= _SMALL, codes.numel() <= _TINY
    counts = [most - 1, most] if tiny and most > 1 else [most]
    ways = [_digits(codes, number_format, count) for count in counts if small or zero_bytes <= _SPARSE]
    if zero_bytes > (_MAYBE_SPARSE_IF_TINY if tiny else _MAYBE_SPARSE if small else _SPARSE):
        ways.append(_runs(codes, number_format, longest))
    return ways


def codes_of(stream: Tensor, shape: tuple[int, int], number_format: Format) -> Tensor:
    """The codes int8 of that shape [rows, cols] in a stream of `code_ways`.

    Raises:
        ValueError: the stream is none of so many codes.
    """
    if not 0 < stream.numel() <= shape[0] * shape[1] + EXTRA:
        raise ValueError("its codes have another number of bytes")
    count = int(stream[0])
    return _from_digits(stream[1:], shape, number_format, count) if count else _from_runs(stream, shape, number_format)


def _zeros(codes: Tensor) -> float:
    """The share of codes 0."""
    return 1 - int(torch.count_nonzero(codes)) / codes.numel()


# Digits -----------------------------------------------------------------------------------------------------------


def _most_digits(number_format: Format) -> int:
    """Codes to a byte: as many as there is room for in fields of equal width."""
    return 8 // index_bits(1 << number_format.code_bits)


def _width(count: int) -> int:
    """Bytes of an integer that holds so many digits, one to a byte."""
    return next(width for width in _DTYPES if count <= width)


def _digits(codes: Tensor, number_format: Format, count: int) -> Tensor:
    """Codes, `count` to a byte, behind that number."""
    rows, cols = codes.shape
    width, base = _width(count), number_format.levels
    # The bytes of an integer are digits; this moves each to the highest byte, times its power of the base. No sum of
    # the bytes below reaches the next, because all digits together are less than 256.
    factor = sum(base**i << 8 * (width - 1 - i) for i in range(count))
    stream = torch.empty(1 + rows * -(-cols // count), dtype=torch.uint8)
    stream[0], height = count, block_rows(codes)
    for row, out in zip(range(0, rows, height), stream[1:].view(rows, -1).split(height), strict=True):
        stored = codes[row : row + height].view(torch.uint8) + number_format.offset
        stored = torch.nn.functional.pad(stored, (0, -cols % count))
        if count < width:
            stored = torch.nn.functional.pad(stored.unflatten(1, (-1, count)), (0, width - count)).flatten(1)
        words = stored.view(_DTYPES[width])
        out.copy_(words if width == 1 else words * factor >> 8 * (width - 1))
    return stream


def _from_digits(stream: Tensor, shape: tuple[int, int], number_format: Format, count: int) -> Tensor:
    """The inverse of `_digits`, without the first byte."""
    rows, cols = shape
    if count > _most_digits(number_format) or stream.numel() != rows * -(-cols // count):
        raise ValueError("its codes have another number of bytes")
    if int(stream.max()) >= number_format.levels**count:
        raise ValueError("a byte of codes is out of range")
    if count == 1:
        return (stream - number_format.offset).view(torch.int8).view(shape)
    table = _digits_of_bytes(number_format.levels, number_format.min_code, count)
    codes = torch.empty(shape, dtype=torch.int8)
    height = block_rows(codes)
    for row, packed in zip(range(0, rows, height), stream.view(rows, -1).split(height), strict=True):
        words = table.index_select(0, packed.flatten().int())
        found = words.view(torch.int8).view(len(packed), -1, _width(count))[..., :count].flatten(1)
        if bool((found[:, cols:] != number_format.min_code).any()):
            raise ValueError("what only fills up a row of codes is not zero")
        codes[row : row + height] = found[:, :cols]
    return codes


@functools.cache
def _digits_of_bytes(base: int, lowest: int, count: int) -> Tensor:
    """For each byte its digits as codes, one to a byte of an integer [256]."""
    width = _width(count)
    digits = torch.arange(256)[:, None] // base ** torch.arange(width) % base
    return (digits + lowest).to(torch.int8).contiguous().view(_DTYPES[width])[:, 0]


# Runs -------------------------------------------------------------------------------------------------------------


def _others(number_format: Format) -> list[int]:
    """All codes but 0, the smallest first."""
    codes = range(number_format.min_code, number_format.maximum + 1)
    return sorted(filter(None, codes), key=lambda code: (abs(code), code < 0))


def _longest_run(codes: Tensor, number_format: Format) -> int:
    """How many codes 0 a byte of runs should stand for; 1 where there is no room for more."""
    zeros = min(_zeros(codes), 1 - 1e-6)
    wanted = round(math.log(_RARE) / math.log(zeros)) if zeros else 0
    return min(max(2, wanted), 255 // len(_others(number_format)))


def _runs(codes: Tensor, number_format: Format, longest: int) -> Tensor:
    """Codes as runs, behind the bytes that say so."""
    others = _places_of_others(tuple(_others(number_format)))
    pieces, waiting = [torch.tensor([0, longest], dtype=torch.uint8)], 0
    for block in codes.flatten().split(BLOCK):
        places = torch.from_numpy(np.flatnonzero(block.numpy() != 0))  # that of torch is several times slower
        if not len(places):
            waiting += len(block)
            continue
        runs = torch.diff(places, prepend=places.new_tensor([-1])) - 1
        runs[0] += waiting
        waiting = len(block) - 1 - int(places[-1])
        found = others.index_select(0, block.index_select(0, places).view(torch.uint8).int())
        pieces.append(_words(runs, found, longest))
    pieces.append(_words(torch.tensor([waiting]), torch.tensor([0]), longest))
    return torch.cat(pieces)


@functools.cache
def _places_of_others(others: tuple[int, ...]) -> Tensor:
    """For each byte of a code but 0 which of the others it is, int64 [256]."""
    places = torch.zeros(256, dtype=torch.int64)
    places[list(others)] = torch.arange(len(others))  # from the end where they are negative, as their bytes are
    return places


def _words(runs: Tensor, others: Tensor, longest: int) -> Tensor:
    """Runs of zeros int64 [n], each in front of one of the other codes, int64 [n], as bytes."""
    full = runs // longest
    ends = (full + 1).cumsum(0)
    words = torch.zeros(int(ends[-1]), dtype=torch.uint8)
    words[ends - 1] = (1 + others * longest + (runs - full * longest)).byte()
    return words


def _from_runs(stream: Tensor, shape: tuple[int, int], number_format: Format) -> Tensor:
    """The inverse of `_runs`."""
    count, longest = shape[0] * shape[1], int(stream[1]) if stream.numel() > 2 else 0
    if not 0 < longest <= 255 // len(_others(number_format)):
        raise ValueError("its runs of codes have no possible length")
    lengths, last = _run_table(tuple(_others(number_format)), longest)
    codes, place = torch.zeros(count + 1, dtype=torch.int8), 0
    for block in stream[2:].split(BLOCK):
        words = block.int()
        if int(words.max()) >= len(lengths):
            raise ValueError("a byte of codes is out of range")
        ends = lengths.index_select(0, words).cumsum(0) + place
        place = int(ends[-1])
        if place > count + 1:
            break
        codes.scatter_(0, ends - 1, last.index_select(0, words))
    if place != count + 1 or int(codes[-1]) != 1:
        raise ValueError("its codes are of another number")
    return codes[:-1].view(shape)


@functools.cache
def _run_table(others: tuple[int, ...], longest: int) -> tuple[Tensor, Tensor]:
    """For each byte of runs how many codes it stands for, int64, and the last of them, int8."""
    lengths = torch.cat([torch.tensor([longest]), torch.arange(1, longest + 1).repeat(len(others))])
    last = torch.tensor([0, *others], dtype=torch.int8)
    return lengths, torch.cat([last[:1], last[1:].repeat_interleave(longest)])
