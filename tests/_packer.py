"""The layout of packed codes, written from its specification one code at a time: slow, to compare with."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from edgerazor import formats
from edgerazor.formats import Encoded

LANES = 16


def positions(columns: int, group_size: int) -> tuple[np.ndarray, int]:
    """The position of each column, and how many there are: each group begins at a multiple of four."""
    group_size = min(group_size, columns)
    found, base = [], 0
    for begin in range(0, columns, group_size):
        width = min(group_size, columns - begin)
        found += range(base, base + width)
        base += -(-width // 4) * 4
    return np.array(found), base


def base3(trits: np.ndarray) -> np.ndarray:
    """Bytes of digits [..., 5]."""
    r = trits[..., :4] @ np.array([1, 3, 9, 27])
    return np.where(r < 64, 64 * trits[..., 4] + r, 192 + 17 * trits[..., 4] + (r - 64))


def fields(quads: np.ndarray, width: int, fill: int) -> list[np.ndarray]:
    """Vectors [lanes, 4] of bit fields of quads [n, lanes, 4]; `fill` is in those that are left over."""
    count = 8 // width
    padding = np.full((-len(quads) % count, *quads.shape[1:]), fill & (1 << width) - 1, dtype=np.int64)
    padded = np.concatenate([quads & (1 << width) - 1, padding])
    shifts = (np.arange(count) * width)[:, None, None]
    return [(padded[q : q + count] << shifts).sum(0) for q in range(0, len(padded), count)]


def chunk(quads: np.ndarray, bits: int) -> list[np.ndarray]:
    """Vectors of a chunk of quads [n, lanes, 4]; bits 0 is ternary."""
    if bits == 0:
        whole = len(quads) // 5 * 5
        found = [base3(np.moveaxis(quads[q : q + 5], 0, -1)) for q in range(0, whole, 5)]
        return found + fields(quads[whole:], 2, 1)
    planes, shift = [], 0
    for width in (8, 4, 2, 1):
        if bits & width:
            planes += fields(quads >> shift, width, 1 << (bits - 1) >> shift)
            shift += width
    return planes


def pack(encoded: Encoded, name: str, group_size: int) -> tuple[Tensor, Tensor]:
    """Codes uint8 [row blocks, bytes] and scales float16 [row blocks, groups, 16] of a part."""
    number_format = formats.get(name)
    bits = 0 if name == "ternary" else number_format.code_bits
    lowest = -1 if bits == 0 else -(2 ** (bits - 1))
    rows, columns = encoded.codes.shape
    place, width = positions(columns, group_size)
    blocks = -(-rows // LANES)
    u = np.full((blocks * LANES, width), -lowest, dtype=np.int64)
    u[:rows, place] = encoded.codes.numpy().astype(np.int64) - lowest
    quads = u.reshape(blocks, LANES, width // 4, 4).transpose(0, 2, 1, 3)  # [blocks, quads, lanes, 4]
    size = 64 if bits == 0 else 8
    packed = [
        np.stack([v for begin in range(0, width // 4, size) for v in chunk(block[begin : begin + size], bits)])
        for block in quads
    ]
    scales = torch.zeros(blocks * LANES, encoded.scales.shape[1], dtype=torch.float16)
    scales[:rows] = encoded.scales
    scales = scales.view(blocks, LANES, -1).transpose(1, 2).contiguous()
    return torch.from_numpy(np.stack(packed).astype(np.uint8).reshape(blocks, -1)), scales
