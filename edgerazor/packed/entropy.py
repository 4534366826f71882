"""Entropy of codes and scales: the size below which no coder of single symbols can compress them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field

from edgerazor import formats
from edgerazor.formats import Encoded, MatrixSpec
from edgerazor.packed.compression import entropy_bytes
from edgerazor.packed.reading import PackedModel
from edgerazor.packed.sizes import TensorClass, class_sizes
from edgerazor.packed.threads import in_parallel


class ClassBits(BaseModel):
    """Bits per weight of one class of tensors, or of all; for tensors that are not quantized, those of their dtype."""

    model_config = ConfigDict(extra="forbid")

    kind: TensorClass | None = Field(description="null: all of them")
    weights: int = Field(description="number of weights")
    nominal_bits: float = Field(description="by the formats' names")
    packed_bits: float = Field(description="of what kernels read, scales and padding included")
    entropy_bits: float = Field(description="Shannon entropy, order 0, of each part's codes, and of its scales")
    stored_bits: float = Field(description="of what is stored, compressed or not")


class _Sums(NamedTuple):
    """Sums over tensors: weights, nominal bits, and bytes as packed, by entropy, and as stored."""

    weights: int
    nominal: float
    packed: float
    entropy: float
    stored: float


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


def bits_table(model: PackedModel, done: Callable[[], None] | None = None) -> list[ClassBits]:
    """Bits of each class of tensors that the model has, and of all; reads and checks every matrix, on all cores.

    Args:
        model: a packed model.
        done: called after each matrix, from any thread.

    Raises:
        UserError: something is damaged.
    """
    entropies: dict[str, float] = {}
    packed_bytes: dict[str, int] = {}

    def measure(name: str) -> None:
        matrix = model.matrix(name)
        entropies[name] = matrix_entropy_bytes(matrix.encoded, matrix.spec)
        rows, cols = matrix.encoded.codes.shape
        packed_bytes[name] = matrix.spec.packed_bytes((rows, cols))

    entries = model.header.matrices
    in_parallel([(math.prod(entry.shape), functools.partial(measure, name)) for name, entry in entries.items()], done)
    sums_of_class = []
    for kind in get_args(TensorClass):
        sizes = list(class_sizes(model, kind))
        weights, nominal, stored = (sum(column) for column in zip(*sizes, strict=True)) if sizes else (0, 0.0, 0)
        names = [name for name, entry in entries.items() if entry.kind == kind]
        entropy = sum(entropies[name] for name in names) if names else stored
        size = sum(packed_bytes[name] for name in names) if names else stored
        if weights:
            sums_of_class.append((kind, _Sums(int(weights), nominal, size, entropy, stored)))
    total = _add(sums for _, sums in sums_of_class)
    return [*(_bits(kind, sums) for kind, sums in sums_of_class), _bits(None, total)]


def _add(parts: Iterable[_Sums]) -> _Sums:
    return _Sums(*(sum(column) for column in zip(*parts, strict=True)))


def _bits(kind: TensorClass | None, sums: _Sums) -> ClassBits:
    return ClassBits(
        kind=kind,
        weights=sums.weights,
        nominal_bits=sums.nominal / sums.weights,
        packed_bits=8 * sums.packed / sums.weights,
        entropy_bits=8 * sums.entropy / sums.weights,
        stored_bits=8 * sums.stored / sums.weights,
    )
