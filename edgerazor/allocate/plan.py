"""The plan of a student, `calibrate/plan.json`: a format for every row or block of every matrix."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor

from edgerazor import formats
from edgerazor.formats import MatrixSpec
from edgerazor.modules.attention import UNIMPORTANT_BITS


class MatrixPlan(BaseModel):
    """The formats of one matrix. Each digit of a text is an index into `formats`.

    `row_formats` has a digit per row; `block_formats` a text per row, or one for all rows, with a digit per group.
    One of the two, or neither when the matrix has one format. `published`: scales by the formats' published rules.
    `rotation`: of its columns, where their number is even.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    kind: Literal["linear", "embedding", "head"]
    rows: int
    columns: int
    formats: tuple[str, ...]
    row_formats: str = ""
    block_formats: tuple[str, ...] = ()
    group_size: int
    published: bool = False
    rotation: Literal["hadamard"] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> MatrixPlan:
        if len(self.row_formats) not in (0, self.rows) or len(self.block_formats) not in (0, 1, self.rows):
            described = len(self.row_formats or self.block_formats)
            raise ValueError(f"{self.name} has {self.rows} rows but formats for {described}")
        if (len(self.formats) > 1) != bool(self.row_formats) + bool(self.block_formats):
            raise ValueError(f"{self.name} does not say once what has which format")
        groups = formats.group_count(self.columns, self.group_size)
        if any(len(row) != groups for row in self.block_formats):
            raise ValueError(f"{self.name} has rows of {groups} groups but formats for another number")
        digits = {str(index) for index in range(len(self.formats))}
        if not set(self.row_formats).union(*self.block_formats) <= digits:
            raise ValueError(f"{self.name} has a format that is none of its {len(self.formats)}")
        return self

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.columns

    def spec(self) -> MatrixSpec:
        """The specification that encoding and decoding take."""
        rows = from_digits(self.row_formats) if self.row_formats else None
        blocks = from_digits("".join(self.block_formats)) if self.block_formats else None
        if blocks is not None:
            blocks = blocks.view(len(self.block_formats), -1)
        rotation = formats.find_rotation(self.rotation, self.columns)
        return MatrixSpec(self.formats, self.group_size, rows, blocks, self.published, rotation)

    def bytes(self) -> int:
        """Stored bytes of codes, scales and format indices."""
        return self.spec().packed_bytes(self.shape)


class Plan(BaseModel):
    """The formats and bit widths of a student, as `calibrate/plan.json` holds them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    requested_bits: float
    strategy: str
    estimate: str | None = None
    predicted_kl: float | None = None
    granularity: str
    activation_bits: int
    activation_scales: Literal["dynamic", "static", "learned", "asymmetric"]
    kv_bits: int
    query_bits: int
    probability_bits: int
    adaptive_tokens: Literal["off", "causal", "ranked"]
    group_size: int
    scales: Literal["computed", "learned"]
    matrices: tuple[MatrixPlan, ...]

    def __getitem__(self, name: str) -> MatrixPlan:
        """The plan of a matrix by its module's path; `KeyError` if there is none."""
        for matrix in self.matrices:
            if matrix.name == name:
                return matrix
        raise KeyError(name)

    def specs(self) -> dict[str, MatrixSpec]:
        """Module path -> specification of its matrix."""
        return {matrix.name: matrix.spec() for matrix in self.matrices}

    @property
    def rotation(self) -> str | None:
        """The rotation of matrices and their inputs, as the recipe calls it; None where there is none."""
        return next((matrix.rotation for matrix in self.matrices if matrix.rotation), None)

    def nominal_bits(self) -> float:
        """Nominal bits per weight, averaged over the weights of the decoder's linear layers."""
        linears = [matrix for matrix in self.matrices if matrix.kind == "linear"]
        weights = [matrix.rows * matrix.columns for matrix in linears]
        bits = [matrix.spec().nominal_bits(matrix.shape) for matrix in linears]
        return sum(w * b for w, b in zip(weights, bits, strict=True)) / sum(weights)

    def bytes(self) -> int:
        """Stored bytes of all planned matrices."""
        return sum(matrix.bytes() for matrix in self.matrices)

    def weights(self) -> int:
        """Number of weights of all planned matrices."""
        return sum(matrix.rows * matrix.columns for matrix in self.matrices)

    def notation(self) -> str:
        """The field's short name: W1.88-A8-KV8, or W4-A8/4-KV8 where some tokens have fewer bits."""
        low_bits = "" if self.adaptive_tokens == "off" else f"/{UNIMPORTANT_BITS}"
        return f"W{self.nominal_bits():.2f}-A{self.activation_bits}{low_bits}-KV{self.kv_bits}".replace(".00-", "-")


def digits(indices: Tensor) -> str:
    """Numbers below 10, any shape, as a text of digits."""
    return (indices.to(torch.uint8) + ord("0")).numpy().tobytes().decode()


def from_digits(text: str) -> Tensor:
    """The inverse of `digits`: uint8 [n]."""
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) - ord("0")
