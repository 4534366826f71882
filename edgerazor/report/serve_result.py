"""What `serve` says of a server once it listens."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class ServeResult(BaseModel):
    """A server that listens."""

    url: str = Field(description="where; the OpenAI interface is under /v1, the chat page under /")
    model: str = Field(description="its name in the interface")
    folder: str = Field(description="the packed folder")
    engine: Literal["native", "transformers"] = Field(description="what computes")
    kernel: str = Field(description="names of the kernels that multiply")
    threads: int
    note: str | None = Field(description="why it is not the native engine")
    context: int = Field(description="most tokens of a prompt and its answer")
    max_sequences: int = Field(description="texts written at a time")
    needs_key: bool
