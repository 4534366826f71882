"""zstd frames of the streams of a part (`formats/core/streams.py`): small when written, safe to read.

zstd finds repetitions and codes what is left, byte by byte, with a Huffman table for each 128 KB block. Codes of
weights repeat only by chance, and a chance repetition costs more to describe than it saves; so repetitions are searched
for with the cheapest strategy, from seven bytes on. (It still finds whole equal rows, such as those of tokens that
training has never seen.) Where a frame comes out larger than the entropy of its bytes even so, zstd's optimal parser,
which is slower but weighs the cost of each repetition, makes it again.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import zstandard
from torch import Tensor
from zstandard import ZstdCompressionParameters, ZstdCompressor, ZstdDecompressor, ZstdError

from edgerazor import formats
from edgerazor.formats import Streams

#: A frame is never smaller than its content divided by this, so that no small file can fill the memory.
LARGEST_RATIO = 256
#: For that limit so many codes count as one byte of content, however few bytes their streams have.
NARROWEST = 4
#: Repetitions are searched for in a window of 2^17 bytes, which is all that a reader has to keep.
WINDOW_LOG = 17

#: Fewest bytes of a block of a frame: three of its header, and one that it repeats.
_SHORTEST_BLOCK = 4
_MAGIC = b"\x28\xb5\x2f\xfd"
#: Symbols counted at a time, since counting makes 64-bit integers of them.
_COUNTED = 1 << 20
#: A frame larger than the entropy of its bytes by this factor probably describes chance repetitions.
_ACCEPTED = 1.02


def compress(*parts: Streams) -> bytes:
    """One frame of some parts, each as the candidate that takes fewest bytes; equal streams give equal bytes.

    Each stream begins with a new block. A frame of many codes is never so small that its reader would refuse it.
    """
    streams = [stream for part in parts for stream in _smallest(part.candidates)]
    frame = _frame(streams, zstandard.STRATEGY_FAST)
    if len(frame) > _ACCEPTED * sum(map(entropy_bytes, streams)) + 256:
        frame = min(frame, _frame(streams, zstandard.STRATEGY_BTULTRA), key=len)
    size = sum(stream.numel() for stream in streams)
    least = max(-(-size // LARGEST_RATIO), -(-sum(part.codes for part in parts) // (LARGEST_RATIO * NARROWEST)))
    if len(frame) < least:  # each block takes some bytes, so shorter blocks make a larger frame
        block = max(1, _SHORTEST_BLOCK * size // least)
        frame = _frame([piece for stream in streams for piece in stream.split(block)], zstandard.STRATEGY_FAST)
    return frame


def decompress(frame: Tensor, most: int) -> Tensor:
    """The streams of a frame, uint8 [n], one after the other: uint8 [at most `most`].

    Raises:
        ValueError: it is not exactly one zstd frame of so many bytes, or it would take too much memory to read.
    """
    data = formats.tensor_bytes(frame)
    try:
        parameters = zstandard.get_frame_parameters(data)
        size = parameters.content_size
        if data[:4] != _MAGIC or not 0 <= size <= most:
            raise ValueError(f"it is not a zstd frame of at most {most} bytes")
        if parameters.dict_id:
            raise ValueError("its zstd frame needs a dictionary")
        if len(data) * LARGEST_RATIO < size:
            raise ValueError(f"its zstd frame is less than 1/{LARGEST_RATIO} of {size} bytes")
        if parameters.window_size > 1 << WINDOW_LOG:
            raise ValueError(f"its zstd frame has a window of more than {1 << WINDOW_LOG} bytes")
        content = ZstdDecompressor().decompress(data, max_output_size=size, allow_extra_data=False)
    except ZstdError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"it is not one zstd frame ({reason})") from None
    if len(content) != size:
        raise ValueError(f"its zstd frame does not hold {size} bytes")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8) if size else torch.empty(0, dtype=torch.uint8)


def largest_frame(most: int) -> int:
    """Most bytes that `compress` makes of `most` bytes: three more for each block, which may be short, and a header."""
    return most + 3 * (most // (2 * LARGEST_RATIO) + 8) + 32


def entropy_bytes(symbols: Tensor) -> float:
    """Shannon entropy (order 0), in bytes, of all symbols together: integers from 0 on, any shape."""
    if not symbols.numel():
        return 0.0
    largest = int(symbols.max())
    pieces = symbols.flatten().split(_COUNTED)
    counts = sum(
        (torch.bincount(piece, minlength=largest + 1) for piece in pieces), torch.zeros(largest + 1, dtype=torch.int64)
    )
    counts = counts[counts > 0].double()
    total = float(counts.sum())
    return (total * math.log2(total) - float((counts * counts.log2()).sum())) / 8


def _smallest(candidates: Sequence[Sequence[Tensor]]) -> Sequence[Tensor]:
    """The candidate with the smallest frame."""
    if len(candidates) == 1:
        return candidates[0]
    return min(candidates, key=lambda streams: len(_frame(streams, zstandard.STRATEGY_FAST)))


def _frame(streams: Sequence[Tensor], strategy: int) -> bytes:
    size = sum(stream.numel() for stream in streams)
    compressor = ZstdCompressor(compression_params=_parameters(strategy)).compressobj(size=size)
    parts = []
    for index, stream in enumerate(streams):
        parts.append(compressor.compress(formats.tensor_bytes(stream)))
        if index < len(streams) - 1:
            parts.append(compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))
    parts.append(compressor.flush())
    return b"".join(parts)


@functools.cache
def _parameters(strategy: int) -> ZstdCompressionParameters:
    """Parameters without any default, so that all versions of zstd make the same frames."""
    return ZstdCompressionParameters(
        format=zstandard.FORMAT_ZSTD1,
        window_log=WINDOW_LOG,
        hash_log=14,
        chain_log=14,
        search_log=1,
        min_match=7,
        target_length=0 if strategy == zstandard.STRATEGY_FAST else 64,
        strategy=strategy,
        write_content_size=True,
        write_checksum=False,
        write_dict_id=False,
    )
