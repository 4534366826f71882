"""A budget of bits -> a format for every row of every matrix.

EdgeRazor's structural mixed precision ("interleave", arXiv 2605.04062 section 3): the same share `p` of the rows of
every matrix gets the wider of two formats, spread evenly over the rows, the same in each layer. Between 1.58 and
4 bits the two are ternary and int4, above 4 bits int4 and int8. Embeddings and head have a format of their own.

Nothing here measures which rows matter. Another strategy is another function from (sites, budget, statistics) to
row formats, called in `make_plan`; everything downstream reads only the plan.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, model_validator

from edgerazor import formats
from edgerazor.formats import MatrixSpec
from edgerazor.models import Site
from edgerazor.recipe import Calibrate

#: Averages that are names of a share of int4 rows, although their exact average differs in the third digit.
NAMED_SHARES = {1.58: 0.0, 1.88: 1 / 8, 2.79: 1 / 2, 4.0: 1.0}


class MatrixPlan(BaseModel):
    """The format of one matrix. `row_formats` has one digit per row, an index into `formats`; empty when uniform."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    kind: Literal["linear", "embedding", "head"]
    rows: int
    columns: int
    formats: tuple[str, ...]
    row_formats: str = ""
    group_size: int

    @model_validator(mode="after")
    def _consistent(self) -> MatrixPlan:
        if len(self.row_formats) not in (0, self.rows) or (len(self.formats) > 1) != bool(self.row_formats):
            raise ValueError(f"{self.name} has {self.rows} rows but formats for {len(self.row_formats)}")
        digits = {str(index) for index in range(len(self.formats))}
        if not set(self.row_formats) <= digits:
            raise ValueError(f"{self.name} has a row format that is none of its {len(self.formats)}")
        return self

    def spec(self) -> MatrixSpec:
        """The same for the number formats: `row_formats` as uint8 [rows] or None."""
        digits = torch.tensor([int(digit) for digit in self.row_formats], dtype=torch.uint8)
        return MatrixSpec(self.formats, self.group_size, digits if self.row_formats else None)

    def bytes(self) -> int:
        """Stored bytes of codes, scales and row formats."""
        total = self.rows * formats.group_count(self.columns, self.group_size) * 2 + len(self.row_formats)
        for number_format, rows in self.spec().parts:
            total += number_format.packed_columns(self.columns) * (self.rows if rows is None else len(rows))
        return total


class Plan(BaseModel):
    """What the student will be: `calibrate/plan.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    requested_bits: float
    strategy: str
    activation_bits: int
    activation_scales: Literal["dynamic", "static", "learned"]
    kv_bits: int
    query_bits: int
    probability_bits: int
    adaptive_tokens: Literal["off", "causal", "ranked"]
    group_size: int
    scales: Literal["rule", "learned"]
    matrices: tuple[MatrixPlan, ...]

    def __getitem__(self, name: str) -> MatrixPlan:
        """The plan of a matrix by its module's path; `KeyError` if there is none."""
        for matrix in self.matrices:
            if matrix.name == name:
                return matrix
        raise KeyError(name)

    def specs(self) -> dict[str, MatrixSpec]:
        """Module path -> formats, for the modules that compute."""
        return {matrix.name: matrix.spec() for matrix in self.matrices}

    def nominal_bits(self) -> float:
        """Average over the weights of the decoder's linear layers."""
        linears = [matrix for matrix in self.matrices if matrix.kind == "linear"]
        weights = [matrix.rows * matrix.columns for matrix in linears]
        bits = [matrix.spec().nominal_bits(matrix.rows) for matrix in linears]
        return sum(w * b for w, b in zip(weights, bits, strict=True)) / sum(weights)

    def bytes(self) -> int:
        """Stored bytes of all planned matrices."""
        return sum(matrix.bytes() for matrix in self.matrices)

    def weights(self) -> int:
        return sum(matrix.rows * matrix.columns for matrix in self.matrices)

    def notation(self) -> str:
        """The field's short name: W1.88-A8-KV8."""
        return f"W{self.nominal_bits():.2f}-A{self.activation_bits}-KV{self.kv_bits}".replace(".00-", "-")


def make_plan(sites: Iterable[Site], settings: Calibrate) -> Plan:
    """Formats for every matrix at the requested average.

    Args:
        sites: the matrices of the model.
        settings: bits, group size, format of embeddings and head, strategy.
    """
    matrices = []
    for site in sites:
        if site.kind == "linear":
            names, rows = interleave(site.rows, settings.bits)
        else:
            names, rows = (settings.embedding_format,), ""
        matrices.append(
            MatrixPlan(
                name=site.name,
                kind=site.kind,
                rows=site.rows,
                columns=site.columns,
                formats=names,
                row_formats=rows,
                group_size=settings.group_size,
            )
        )
    return Plan(
        requested_bits=settings.bits,
        strategy=settings.plan,
        activation_bits=settings.activation_bits,
        activation_scales=settings.activation_scales,
        kv_bits=settings.kv_bits,
        query_bits=settings.query_bits,
        probability_bits=settings.probability_bits,
        adaptive_tokens=settings.adaptive_tokens,
        group_size=settings.group_size,
        scales=settings.scales,
        matrices=tuple(matrices),
    )


def interleave(rows: int, bits: float) -> tuple[tuple[str, ...], str]:
    """EdgeRazor's row interleave: the formats and a digit per row (empty when all rows have the one format).

    The named averages 1.58, 1.88, 2.79 and 4 give every 1/p-th row the wider format, beginning with row 0, as
    published. Any other average spreads `floor(p * rows)` rows evenly and so never exceeds its budget.
    """
    low, high = ("ternary", "int4") if bits <= 4 else ("int4", "int8")
    low_bits, high_bits = (formats.get(name).nominal_bits for name in (low, high))
    share = NAMED_SHARES.get(bits, (bits - low_bits) / (high_bits - low_bits))
    if bits in NAMED_SHARES and share > 0:
        every = int(1 / share)
        wide = [row % every == 0 for row in range(rows)]
    else:
        wide = [int((row + 1) * share + 1e-9) > int(row * share + 1e-9) for row in range(rows)]
    if all(wide):
        return (high,), ""
    if not any(wide):
        return (low,), ""
    return (low, high), "".join("1" if each else "0" for each in wide)
