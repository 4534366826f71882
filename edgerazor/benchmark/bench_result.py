"""What `bench` reports: sizes, speeds, memory."""

from __future__ import annotations

from pydantic import BaseModel, Field

from edgerazor.benchmark.engines import Phase


class Run(BaseModel):
    """One measured speed: the median over the rounds."""

    engine: str
    threads: int
    phase: Phase
    context: int
    tokens_per_second: float
    bytes_per_token: int | None = Field(
        None, description="read to decode a token: weights, and the cache's at `context`"
    )
    bandwidth_share: float | None = Field(
        None, description="bytes read a second, of the machine's with as many threads"
    )


class Engine(BaseModel):
    """An engine, and what it took. What the programs of others take to load is not measured."""

    name: str
    threads: int = Field(description="that it was loaded with")
    kernel: str
    weight_bytes: int
    bytes_per_token: int = Field(description="of weights, read to decode a token")
    cache_bytes_per_token: int = Field(description="that a token adds to the cache")
    load_seconds: float | None = Field(None, description="until the first token is computed")
    peak_memory_bytes: int | None = Field(None, description="of its process, the caches of all contexts included")
    start_memory_bytes: int | None = Field(None, description="of its process before it loaded anything")


class MeasuredBandwidth(BaseModel):
    """Reading memory, the median over the rounds."""

    threads: int
    bytes_per_second: float


class BenchResult(BaseModel):
    """Sizes and speeds.

    `bytes`, `load_seconds` and `peak_memory_bytes` are the packed model's, they and `bandwidth_bytes_per_second` with
    the most threads.
    """

    bytes: int
    load_seconds: float
    peak_memory_bytes: int
    bandwidth_bytes_per_second: float
    threads: list[int]
    bandwidths: list[MeasuredBandwidth]
    bandwidth_of: str = Field(description="how memory was read")
    machine: str
    engines: list[Engine]
    runs: list[Run]
    notes: list[str]


class BenchDryRun(BaseModel):
    """What bench would measure."""

    engines: list[str]
    threads: list[int]
    rounds: int
    tokens_per_round: int
    memory_bytes: int
    seconds: float
