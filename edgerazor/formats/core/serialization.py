"""Codes and scales of a part as the one run of bytes that files hold.

First all row blocks of codes, then all row blocks of scales, then zeros up to whole vectors, so that the codes of the
next part begin on a vector, too. The number of row blocks follows from the length.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from edgerazor.formats.core import layout
from edgerazor.formats.core.matrix import SCALES, code_parts, stored_part_bytes, tensor_bytes


def serialize_parts(parts: Mapping[str, Tensor]) -> dict[str, list[memoryview]]:
    """The bytes of the parts of a matrix, as of `pack_matrix`, in pieces to be written one after the other.

    Returns:
        For each part of codes three pieces: the codes, their scales, and zeros. For the part of format indices, if
        there is one, that part.
    """
    pieces = {}
    for part in (name for name in parts if not name.endswith(SCALES)):
        pieces[part] = [tensor_bytes(parts[name]) for name in (part, part + SCALES) if name in parts]
        if part + SCALES in parts:
            size = sum(map(len, pieces[part]))
            pieces[part].append(memoryview(bytes(stored_part_bytes(size) - size)))
    return pieces


def stored_row_blocks(size: int, part: str, cols: int, group_size: int) -> tuple[int, int]:
    """How many row blocks fit into `size` bytes, codes and scales together, and how many bytes those take.

    Args:
        size: bytes of the part in a file.
        part: its name, a format's with or without `.tail`.
        cols: columns of its rows, or of its blocks.
        group_size: columns that share a scale.
    """
    block_bytes = sum(_block_bytes(part, cols, group_size))
    blocks = size // block_bytes
    return blocks, stored_part_bytes(blocks * block_bytes)


def deserialize_part(stored: Tensor, part: str, cols: int, group_size: int) -> dict[str, Tensor]:
    """Codes and scales, as `pack_matrix` makes them, of a part: views of its stored bytes.

    Args:
        stored: the part, uint8 [bytes].
        part, cols, group_size: as for `stored_row_blocks`.

    Raises:
        ValueError: it is not made of whole row blocks, or does not end in zeros; one sentence.
    """
    codes, scales = _block_bytes(part, cols, group_size)
    blocks, size = stored_row_blocks(stored.numel(), part, cols, group_size)
    middle, end = blocks * codes, blocks * (codes + scales)
    if size != stored.numel():
        raise ValueError(f"the part {part} is not made of whole blocks of rows")
    if bool(stored[end:].any()):
        raise ValueError(f"what only fills up the part {part} is not zero")
    # In a file that another program has rewritten, the part may begin at an odd byte, where no float16 can be viewed.
    if stored.storage_offset() % 2 or stored.data_ptr() % 2:
        stored = stored.clone()
    return {
        part: stored[:middle].view(blocks, codes),
        part + SCALES: stored[middle:end].view(torch.float16).view(blocks, -1, layout.ROWS),
    }


def _block_bytes(part: str, cols: int, group_size: int) -> tuple[int, int]:
    """Bytes of the codes and of the scales of one row block."""
    shapes = code_parts(part, (layout.ROWS, cols), group_size)
    codes, scales = (dtype.itemsize * math.prod(shape) for dtype, shape in shapes.values())
    return codes, scales
