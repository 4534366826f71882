"""What `calibrate` reports."""

from __future__ import annotations

from pydantic import BaseModel, Field


class TowersResult(BaseModel):
    """What rounding does to a tower that makes features of pictures."""

    format: str
    groups: dict[str, int] = Field(description="matrix -> weights that share a scale")
    moved: dict[str, float] = Field(
        description="matrix -> squared distance of features where it alone is rounded, relative to their square"
    )
    together: float = Field(description="the same where all of them are")
    pictures: int = Field(description="that were looked at")


class CalibrateResult(BaseModel):
    """What calibrate decided."""

    model: str
    notation: str
    nominal_bits: float
    real_bits: float
    bytes: int
    formats: dict[str, int]
    tokens: int
    layer_similarity: list[float]
    text: str
    estimate: str | None = None
    predicted_kl: float | None = None
    measured_kl: float | None = None
    towers: TowersResult | None = None


class CalibrateDryRun(BaseModel):
    """What calibrate would do.

    `memory_bytes` is what it needs at once besides the program itself; `mapped_bytes` the weights that are read in
    place from the model's files, one layer after the other: memory that is given back where it is short.
    """

    notation: str
    nominal_bits: float
    real_bits: float
    bytes: int
    tokens: int
    generated_tokens: int
    memory_bytes: int
    mapped_bytes: int
    disk_bytes: int
    seconds: float | None
