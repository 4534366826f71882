"""Format indices packed into bytes: which of a few formats each row or block of a matrix has."""

from __future__ import annotations

import torch
from torch import Tensor


def index_bits(count: int) -> int:
    """Bits of a stored index below `count`: 1, 2, 4 or 8, so that none crosses a byte."""
    return next(bits for bits in (1, 2, 4, 8) if count <= 1 << bits)


def index_row_bytes(columns: int, count: int) -> int:
    """Bytes of a row of `columns` packed indices below `count`."""
    return -(-columns * index_bits(count) // 8)


def pack_indices(indices: Tensor, count: int) -> Tensor:
    """Indices below `count`, uint8 [rows, columns], as bytes uint8 [rows, index_row_bytes(columns, count)].

    The first index of a byte is in its lowest bits; the unused bits of a row's last byte are zero.
    """
    bits = index_bits(count)
    fields = torch.nn.functional.pad(indices, (0, -indices.shape[1] % (8 // bits))).unflatten(1, (-1, 8 // bits))
    packed = torch.zeros(fields.shape[:2], dtype=torch.uint8, device=indices.device)
    for i in range(8 // bits):
        packed |= fields[..., i] << (i * bits)
    return packed


def unpack_indices(packed: Tensor, columns: int, count: int) -> Tensor:
    """The inverse of `pack_indices`: uint8 [rows, columns].

    Raises:
        ValueError: the unused bits are not zero. (That each index is below `count` is for the caller to check.)
    """
    bits = index_bits(count)
    fields = [packed >> (i * bits) & ((1 << bits) - 1) for i in range(8 // bits)]
    indices = torch.stack(fields, dim=2).flatten(1)
    if indices[:, columns:].any():
        raise ValueError("the unused bits at the end of a row are not zero")
    return indices[:, :columns].contiguous()
