"""The size of a packed model, and of each class of its tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from edgerazor.packed.container import DTYPES, INDEX_FILE, spec_bytes
from edgerazor.packed.reading import PackedModel

TensorClass = Literal["linear", "embedding", "head", "tower", "other"]


class ClassSize(BaseModel):
    """Size of one class of tensors."""

    model_config = ConfigDict(extra="forbid")

    kind: TensorClass
    weights: int = Field(description="number of weights")
    nominal_bits: float = Field(description="bits a weight by the formats' names")
    bytes: int = Field(description="bytes of tensor data, scales and padding included")
    real_bits: float = Field(description="8 * bytes / weights")


class SizeTable(BaseModel):
    """Size of a packed model. Tied weights are counted once."""

    model_config = ConfigDict(extra="forbid")

    classes: list[ClassSize]
    parameters: int = Field(description="number of all weights")
    bytes: int = Field(description="bytes of the weight files, their headers and index included")
    nominal_bits: float = Field(description="bits a weight of the linear layers by the formats' names")
    real_bits: float = Field(description="8 * bytes / parameters")


def size_table(model: PackedModel) -> SizeTable:
    """Sizes of each class of tensors that the model has, and of all; reads no codes."""
    classes = []
    for kind in get_args(TensorClass):
        sizes = list(class_sizes(model, kind))
        weights = sum(count for count, _, _ in sizes)
        if weights:
            bits, size = sum(nominal for _, nominal, _ in sizes), sum(bytes_ for _, _, bytes_ in sizes)
            classes.append(
                ClassSize(
                    kind=kind, weights=weights, nominal_bits=bits / weights, bytes=size, real_bits=8 * size / weights
                )
            )
    parameters = sum(size_of_class.weights for size_of_class in classes)
    files = model.files()
    if len(files) > 1:
        files.append(model.folder / INDEX_FILE)
    size = sum(file.stat().st_size for file in files)
    return SizeTable(
        classes=classes,
        parameters=parameters,
        bytes=size,
        nominal_bits=next(linear.nominal_bits for linear in classes if linear.kind == "linear"),
        real_bits=8 * size / parameters,
    )


def class_sizes(model: PackedModel, kind: TensorClass) -> Iterator[tuple[int, float, int]]:
    """(weights, weights times nominal bits, bytes) of each matrix or tensor of a class."""
    if kind == "other":
        for entry in model.header.others.values():
            count, itemsize = math.prod(entry.shape), DTYPES[entry.dtype].itemsize
            yield count, 8.0 * itemsize * count, itemsize * count
        return
    stored = model.tensor_shapes()
    for name, matrix in model.header.matrices.items():
        if matrix.kind == kind:
            weights = math.prod(matrix.shape)
            size = sum(spec_bytes(stored[model.header.tensor_name(name, part)]) for part in matrix.sha256)
            yield weights, weights * model.spec(name).nominal_bits(matrix.shape), size
