"""What an importer is: somebody else's quantized weights as our codes and scales, exactly, or a refusal by name.

Others' formats come down to integers times a scale for each group of a row, too; an importer only has to take them out
of their bytes (`IntegerMatrix`). Which number format of ours holds them is decided here, for all importers alike: the
one of fewest bits whose codes include the integers, and the largest groups within which the scale does not change.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from edgerazor import formats
from edgerazor.formats import Encoded, MatrixSpec


class UnrepresentableError(ValueError):
    """Weights that no format of ours holds exactly; one sentence that goes on after the tensor's name."""


class IntegerMatrix(NamedTuple):
    """A matrix: `values` int16 [rows, cols]; `scales` floating [rows, groups of `group_size` columns], of any sign."""

    values: Tensor
    scales: Tensor
    group_size: int


#: What a weight is stored as: integers and scales, or floating numbers as they are.
Stored: TypeAlias = IntegerMatrix | Tensor


class SourceModel(ABC):
    """Somebody else's model, opened.

    Attributes:
        config: its configuration as transformers has it, without settings of any quantization.
        activation_group: consecutive inputs of a linear layer that share a scale where they are rounded; None if it
            does not say.
        activation_bits: of the inputs of linear layers where nobody asks for others: those that the model was made
            for, 16 where its format does not round them.
        notes: what cannot be taken over.
    """

    config: dict[str, Any]
    activation_group: int | None = None
    activation_bits: int = 16
    notes: tuple[str, ...] = ()

    @abstractmethod
    def names(self) -> set[str]:
        """Names of the tensors, as transformers has them (`model.layers.0.mlp.up_proj.weight`)."""

    @abstractmethod
    def quantized(self, name: str) -> bool:
        """Whether `read` gives integers for a tensor."""

    @abstractmethod
    def read(self, name: str) -> Stored:
        """A tensor, by its name.

        Raises:
            UnrepresentableError: it is stored in a way that is not understood.
        """

    @abstractmethod
    def write_tokenizer(self, folder: Path) -> None:
        """Write tokenizer, chat template and generation settings into a folder.

        Raises:
            UserError: there is no usable one.
        """


class Importer(ABC):
    """One format to read.

    Attributes:
        name: that of its file.
        describe: what it is, in a few words.
        only: whether there is no other way to pack such a model; else one that is to be rounded is not imported.
    """

    name: str
    describe: str
    only: bool = True

    @abstractmethod
    def recognises(self, path: Path) -> bool:
        """Whether a file or folder is of this format, at a glance."""

    @abstractmethod
    def open(self, path: Path) -> SourceModel:
        """Read everything but the tensors.

        Raises:
            UserError: it is damaged, or of a family that is not understood.
        """


# Integers in our formats ------------------------------------------------------------------------------------------


def encode_exactly(matrix: IntegerMatrix, lossy: bool = False) -> tuple[Encoded, MatrixSpec]:
    """Codes, scales and format of a matrix of integers.

    Args:
        matrix: its integers and scales.
        lossy: round scales to float16 where they are none.

    Raises:
        UnrepresentableError: no format holds the integers, or a scale is no float16 number and may not be rounded.
    """
    values, scales = _positive(matrix)
    group, scales = _coarsest(scales, matrix.group_size, values.shape[1])
    used = values[_columns(scales != 0, group, values.shape[1])]
    low, high = (int(used.min()), int(used.max())) if used.numel() else (0, 0)
    name, codes, unit = _in_format(values, used, low, high)
    stored = scales.double() * unit
    rounded = stored.half()
    if not torch.isfinite(rounded).all():
        raise UnrepresentableError("a scale is too large for float16")
    if not lossy and not torch.equal(rounded.double(), stored):
        raise UnrepresentableError("a scale is no float16 number")
    codes = codes * _columns(rounded != 0, group, codes.shape[1])
    return Encoded(codes.to(torch.int8), rounded), MatrixSpec((name,), group)


def _positive(matrix: IntegerMatrix) -> tuple[Tensor, Tensor]:
    """Values and scales such that no scale is negative: where one was, both change their signs."""
    if not torch.isfinite(matrix.scales).all():
        raise UnrepresentableError("a scale is not finite")
    if bool((matrix.scales >= 0).all()):
        return matrix.values, matrix.scales.abs()  # no negative zero either
    signs = torch.where(matrix.scales < 0, -1, 1).to(torch.int16)
    columns = torch.arange(matrix.values.shape[1]) // matrix.group_size
    return matrix.values * signs[:, columns], matrix.scales.abs()


def _coarsest(scales: Tensor, group: int, columns: int) -> tuple[int, Tensor]:
    """The largest groups, whole rows or some doubling of those given, that have one scale each, and these scales."""
    if torch.equal(scales, scales[:, :1].expand_as(scales)):
        return columns, scales[:, :1].contiguous()
    while scales.shape[1] > 1:
        left, right = scales[:, ::2], scales[:, 1::2]
        if not torch.equal(left[:, : right.shape[1]], right):
            break
        group, scales = 2 * group, left
    return group, scales.contiguous()


def _columns(of_groups: Tensor, group: int, columns: int) -> Tensor:
    """[rows, groups] repeated for each column of the groups: [rows, columns]."""
    return of_groups[:, torch.arange(columns) // group]


def _in_format(values: Tensor, used: Tensor, low: int, high: int) -> tuple[str, Tensor, float]:
    """The format of fewest bits that holds some integers, their codes, and what a scale is multiplied with."""
    for number_format in sorted(
        map(formats.get, formats.names()), key=lambda number_format: number_format.nominal_bits
    ):
        ends = torch.tensor([number_format.min_code, number_format.max_code], dtype=torch.float32)
        levels = number_format.level_(ends.clone())
        if bool((levels % 1 == 0).all()):
            if number_format.min_code <= low and high <= number_format.max_code:
                return number_format.name, values, 1.0
        elif bool((used % 2 != 0).all()) and 2 * levels[0] <= low and high <= 2 * levels[1]:
            return number_format.name, torch.div(values - 1, 2, rounding_mode="floor"), 2.0
    raise UnrepresentableError(f"its integers go from {low} to {high}, which no number format here holds")
