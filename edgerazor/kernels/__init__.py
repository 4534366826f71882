"""The multiplication by a packed matrix: one definition (`reference.py`) and, where they are built, faster twins of it.

This file chooses. An implementation is a pair of functions with the signatures of `reference.linear` and
`reference.embedding`, under the name of the instruction set that it needs; the last one that the machine can run is
the best. The environment variable `EDGERAZOR_ISA` asks for one by name:

- `reference`: decodes the matrix and multiplies in float32; the default where nothing faster is built;
- `integer`: the definition to the letter, integer sums within groups; slow, to compare with.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from edgerazor import registry
from edgerazor.formats import Encoded, MatrixSpec, decode_matrix
from edgerazor.kernels import reference
from edgerazor.kernels.reference import decoded_linear

__all__ = ["decoded_linear", "embedding", "linear", "name", "names"]

VARIABLE = "EDGERAZOR_ISA"


class _Implementation(NamedTuple):
    linear: Callable[[Tensor, Encoded, MatrixSpec, Tensor | None, int, int, float | None], Tensor]
    embedding: Callable[[Tensor, Encoded, MatrixSpec], Tensor]


def _decode_and_multiply(
    x: Tensor,
    encoded: Encoded,
    spec: MatrixSpec,
    bias: Tensor | None,
    activation_bits: int,
    activation_group: int,
    activation_scale: float | None,
) -> Tensor:
    weight = decode_matrix(encoded, spec)
    return decoded_linear(x, weight, bias, activation_bits, activation_group, activation_scale)


_IMPLEMENTATIONS = {
    "integer": _Implementation(reference.linear, reference.embedding),
    "reference": _Implementation(_decode_and_multiply, reference.embedding),
}


def names() -> list[str]:
    """Names of the implementations that this machine can run, the best one last."""
    return list(_IMPLEMENTATIONS)


def name() -> str:
    """Name of the implementation in use: the one that `EDGERAZOR_ISA` asks for, else the best.

    Raises:
        UserError: there is none of that name here.
    """
    wanted = os.environ.get(VARIABLE) or names()[-1]
    if wanted not in _IMPLEMENTATIONS:
        raise registry.unknown(f"kernel ({VARIABLE})", wanted, names())
    return wanted


def linear(
    x: Tensor,
    encoded: Encoded,
    spec: MatrixSpec,
    bias: Tensor | None = None,
    activation_bits: int = 8,
    activation_group: int = 256,
    activation_scale: float | None = None,
) -> Tensor:
    """`y = W x + bias`, float32 [..., out], for x [..., in]; see `reference.linear` for arguments and errors."""
    multiply = _IMPLEMENTATIONS[name()].linear
    return multiply(x, encoded, spec, bias, activation_bits, activation_group, activation_scale)


def embedding(ids: Tensor, encoded: Encoded, spec: MatrixSpec) -> Tensor:
    """Rows of a packed table, float32 [..., columns], for ids int64 [...]."""
    return _IMPLEMENTATIONS[name()].embedding(ids, encoded, spec)
