"""How small codes and scales could be: their Shannon entropy, which no coder of single symbols beats."""

from __future__ import annotations

import torch

from edgerazor import formats
from edgerazor.formats import Encoded, MatrixSpec
from edgerazor.packed._compression import entropy_bytes


def matrix_entropy_bytes(encoded: Encoded, spec: MatrixSpec) -> float:
    """Entropy (order 0) of a matrix in bytes: of the codes of each part, and of its scales as 16-bit symbols.

    Raises:
        ValueError: the shapes do not fit together.
    """
    total = 0.0
    for _, number_format, _, (codes, scales) in formats.encoded_parts(encoded, spec):
        total += entropy_bytes(codes.view(torch.uint8) + number_format.offset)
        total += entropy_bytes(scales.contiguous().view(torch.int16).int() & 0xFFFF)
    return total
