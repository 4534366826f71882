"""What `pack` reports."""

from __future__ import annotations

from pydantic import BaseModel, Field

from edgerazor import packed
from edgerazor.exporters import ExportResult
from edgerazor.importers import ImportResult


class PackResult(BaseModel):
    """The packed model. `verified`: it decodes to what training computed, or, without training, to what was encoded."""

    folder: str
    source: str
    notation: str
    bytes: int
    parameters: int
    nominal_bits: float
    real_bits: float
    teacher_bytes: int
    verified: bool
    classes: list[packed.ClassSize]
    exports: list[ExportResult] = []


class ExportsResult(BaseModel):
    """Exports of a packed folder that was given directly."""

    folder: str
    exports: list[ExportResult]


class ForeignResult(ImportResult):
    """A packed model made of somebody else's, and its exports."""

    exports: list[ExportResult] = Field(default_factory=list)


class ExportDryRun(BaseModel):
    """What exports of a packed model would take."""

    bytes: dict[str, int]
    real_bits: dict[str, float]


class PackDryRun(BaseModel):
    """What pack would write, but for exports and compression.

    Time is estimated from some rows of each kind of matrix, written and verified. `memory_bytes` is what it needs at
    once besides the program itself; `mapped_bytes` the weights that are read in place. `disk_bytes` are free ones.
    """

    source: str
    notation: str
    bytes: int
    nominal_bits: float
    real_bits: float
    memory_bytes: int
    mapped_bytes: int
    disk_bytes: int
    seconds: float


class CompressResult(BaseModel):
    """A packed folder that was compressed, or restored."""

    folder: str
    compressed: bool
    changed: bool = Field(description="false where it was so already")
    bytes_before: int
    bytes: int
    real_bits: float
