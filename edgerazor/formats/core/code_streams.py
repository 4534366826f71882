"""Codes as bytes that a coder of single bytes (Huffman's, in zstd) compresses nearly to their entropy.

Huffman's code gives a byte a whole number of bits. That wastes least where no byte is frequent: one that is half of
all bytes should take one bit and does, but one that is nine tenths should take 0.15 bits and takes one as well. What is
frequent also repeats by chance, and zstd points at each repetition, which costs more than it saves. So codes are put
into bytes in one of two ways, and the first byte of the stream says in which:

- *Digits* (first byte `k`, 1 to 4): `k` codes of a row to a byte, `code - min_code` as digits in the base that is the
  number of codes, the first code the lowest digit; each row begins with a new byte, and zeros fill its last one. Such a
  byte has the entropy of its codes, since neighbours say nothing of each other, and equal rows stay equal.
- *Runs* (first bytes 0 and `longest`), where so many codes are 0 that most bytes of digits would be 0: all rows one
  after the other, and then one more code, 1. Byte 0 is `longest` codes 0; byte `1 + longest * i + r` is `r` codes 0,
  fewer than `longest`, and then the i-th code that is not 0, the smallest first (1, -1, 2, -2, ...). These words are a
  complete code of their own, so the entropy of the bytes is again that of the codes, whatever `longest` is.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor

from edgerazor.formats.core.base import BLOCK, Format, block_rows
from edgerazor.formats.core.indices import index_bits

#: Where more than this share of the bytes of digits is zero, runs take fewer bits.
_SPARSE = 1 / 4
#: The longest run is one that has this probability: the bytes are then about equally frequent.
_RARE = 1 / 8
#: With at most so many codes, the table of Huffman's code is a good part of the frame. Then both ways are tried, if at
#: least this share of the bytes of digits is zero.
_SMALL, _MAYBE_SPARSE = 1 << 17, 1 / 8
#: With at most so many, the table is so large a part that fewer digits to a byte may be better.
_TINY, _MAYBE_SPARSE_IF_TINY = 1 << 15, 1 / 32
#: Most bytes of a stream beside one for each code: two that say how it is made, and the code after the last one.
EXTRA = 3
_DTYPES = {1: torch.int8, 2: torch.int16, 4: torch.int32}


def code_stream_candidates(codes: Tensor, number_format: Format) -> list[Tensor]:
    """Streams uint8 [n], each of which holds the codes int8 [rows, cols]: the best one, or, of few codes, some to try.

    Raises:
        ValueError: a code is out of the format's range.
    """
    number_format.check_codes(codes)
    most, longest = _most_digits(number_format), _longest_run(codes, number_format)
    zero_bytes = _zero_share(codes) ** most if longest > 1 else 0
    small, tiny = codes.numel() <= _SMALL, codes.numel() <= _TINY
    counts = [most - 1, most] if tiny and most > 1 else [most]
    candidates = [_digits(codes, number_format, count) for count in counts if small or zero_bytes <= _SPARSE]
    if zero_bytes > (_MAYBE_SPARSE_IF_TINY if tiny else _MAYBE_SPARSE if small else _SPARSE):
        candidates.append(_runs(codes, number_format, longest))
    return candidates


def codes_from_stream(stream: Tensor, shape: tuple[int, int], number_format: Format) -> Tensor:
    """The codes int8 of that shape [rows, cols] in a stream of `code_stream_candidates`.

    Raises:
        ValueError: the stream cannot hold so many codes.
    """
    if not 0 < stream.numel() <= shape[0] * shape[1] + EXTRA:
        raise ValueError("its codes have another number of bytes")
    count = int(stream[0])
    return _from_digits(stream[1:], shape, number_format, count) if count else _from_runs(stream, shape, number_format)


def _zero_share(codes: Tensor) -> float:
    """The share of codes 0."""
    return 1 - int(torch.count_nonzero(codes)) / codes.numel()


# Digits -----------------------------------------------------------------------------------------------------------


def _most_digits(number_format: Format) -> int:
    """Most codes to a byte: as many as have room in bit fields of 1, 2, 4 or 8 bits."""
    return 8 // index_bits(1 << number_format.code_bits)


def _width(count: int) -> int:
    """Bytes of the integer dtype that holds so many digits, one to a byte."""
    return next(width for width in _DTYPES if count <= width)


def _digits(codes: Tensor, number_format: Format, count: int) -> Tensor:
    """A first byte `count`, then codes, `count` to a byte."""
    rows, cols = codes.shape
    width, base = _width(count), number_format.code_count
    # The bytes of an integer are digits; multiplying by this factor adds each, times its power of the base, into the
    # highest byte. The bytes below never carry into it, because all digits together make a number below 256.
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
    if int(stream.max()) >= number_format.code_count**count:
        raise ValueError("a byte of codes is out of range")
    if count == 1:
        return (stream - number_format.offset).view(torch.int8).view(shape)
    table = _digits_of_bytes(number_format.code_count, number_format.min_code, count)
    codes = torch.empty(shape, dtype=torch.int8)
    height = block_rows(codes)
    for row, packed in zip(range(0, rows, height), stream.view(rows, -1).split(height), strict=True):
        words = table.index_select(0, packed.flatten().int())
        unpacked = words.view(torch.int8).view(len(packed), -1, _width(count))[..., :count].flatten(1)
        if bool((unpacked[:, cols:] != number_format.min_code).any()):
            raise ValueError("what only fills up a row of codes is not zero")
        codes[row : row + height] = unpacked[:, :cols]
    return codes


@functools.cache
def _digits_of_bytes(base: int, min_code: int, count: int) -> Tensor:
    """The digits of each byte as codes, one to a byte of an integer: [256]."""
    width = _width(count)
    digits = torch.arange(256)[:, None] // base ** torch.arange(width) % base
    return (digits + min_code).to(torch.int8).contiguous().view(_DTYPES[width])[:, 0]


# Runs -------------------------------------------------------------------------------------------------------------


def _nonzero_codes(number_format: Format) -> list[int]:
    """All codes but 0, those of the smallest magnitude first, the positive one of two first."""
    codes = range(number_format.min_code, number_format.max_code + 1)
    return sorted(filter(None, codes), key=lambda code: (abs(code), code < 0))


def _longest_run(codes: Tensor, number_format: Format) -> int:
    """How many codes 0 a byte of runs should stand for; 1 where a byte has no room for more."""
    zeros = min(_zero_share(codes), 1 - 1e-6)
    ideal = round(math.log(_RARE) / math.log(zeros)) if zeros else 0
    return min(max(2, ideal), 255 // len(_nonzero_codes(number_format)))


def _runs(codes: Tensor, number_format: Format, longest: int) -> Tensor:
    """The first bytes 0 and `longest`, then codes as runs."""
    index_of_byte = _nonzero_code_indices(tuple(_nonzero_codes(number_format)))
    pieces, open_run = [torch.tensor([0, longest], dtype=torch.uint8)], 0
    for block in codes.flatten().split(BLOCK):
        positions = torch.from_numpy(np.flatnonzero(block.numpy() != 0))  # that of torch is several times slower
        if not len(positions):
            open_run += len(block)
            continue
        runs = torch.diff(positions, prepend=positions.new_tensor([-1])) - 1
        runs[0] += open_run
        open_run = len(block) - 1 - int(positions[-1])
        indices = index_of_byte.index_select(0, block.index_select(0, positions).view(torch.uint8).int())
        pieces.append(_run_bytes(runs, indices, longest))
    pieces.append(_run_bytes(torch.tensor([open_run]), torch.tensor([0]), longest))
    return torch.cat(pieces)


@functools.cache
def _nonzero_code_indices(nonzero_codes: tuple[int, ...]) -> Tensor:
    """The index among the codes that are not 0 of each byte of such a code, int64 [256]."""
    indices = torch.zeros(256, dtype=torch.int64)
    indices[list(nonzero_codes)] = torch.arange(len(nonzero_codes))  # a negative code counts from the end, as its byte
    return indices


def _run_bytes(runs: Tensor, indices: Tensor, longest: int) -> Tensor:
    """The bytes of runs of zeros int64 [n], each before a code that is not 0, of these indices int64 [n]."""
    full = runs // longest
    ends = (full + 1).cumsum(0)
    stream = torch.zeros(int(ends[-1]), dtype=torch.uint8)
    stream[ends - 1] = (1 + indices * longest + (runs - full * longest)).byte()
    return stream


def _from_runs(stream: Tensor, shape: tuple[int, int], number_format: Format) -> Tensor:
    """The inverse of `_runs`."""
    count, longest = shape[0] * shape[1], int(stream[1]) if stream.numel() > 2 else 0
    if not 0 < longest <= 255 // len(_nonzero_codes(number_format)):
        raise ValueError("its runs of codes have no possible length")
    lengths, last_codes = _run_table(tuple(_nonzero_codes(number_format)), longest)
    codes, position = torch.zeros(count + 1, dtype=torch.int8), 0
    for block in stream[2:].split(BLOCK):
        words = block.int()
        if int(words.max()) >= len(lengths):
            raise ValueError("a byte of codes is out of range")
        ends = lengths.index_select(0, words).cumsum(0) + position
        position = int(ends[-1])
        if position > count + 1:
            break
        codes.scatter_(0, ends - 1, last_codes.index_select(0, words))
    if position != count + 1 or int(codes[-1]) != 1:
        raise ValueError("its codes are of another number")
    return codes[:-1].view(shape)


@functools.cache
def _run_table(nonzero_codes: tuple[int, ...], longest: int) -> tuple[Tensor, Tensor]:
    """For each byte of runs the number of codes that it stands for, int64, and the last of them, int8."""
    lengths = torch.cat([torch.tensor([longest]), torch.arange(1, longest + 1).repeat(len(nonzero_codes))])
    codes = torch.tensor([0, *nonzero_codes], dtype=torch.int8)
    return lengths, torch.cat([codes[:1], codes[1:].repeat_interleave(longest)])
