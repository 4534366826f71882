"""What `show` tells of a recording: what it is of, its parts and sizes, whether every byte is as it was written."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel
from rich.console import RenderableType

from edgerazor import recording
from edgerazor.console import megabytes, table
from edgerazor.recording import Recording


class RecordingSummary(BaseModel):
    """A recording. `verified`: every sequence was read, which `--verify` asks for."""

    folder: str
    complete: bool
    covers: str
    method: str
    draws: int
    power: float
    temperature: float
    hidden_layers: list[int]
    sequences: int
    tokens: int
    bytes: int
    held_out_sequences: int
    held_out_tokens: int
    held_out_bytes: int
    inputs: dict[str, str]
    verified: bool


def is_recording(folder: Path) -> bool:
    """Whether a folder holds a recording, finished or not."""
    return (folder / recording.FILE).is_file()


def look_into(folder: Path, verify: bool) -> RecordingSummary:
    """What a recording says of itself.

    Raises:
        UserError: it is damaged.
    """
    description = recording.read_description(folder)
    if verify:
        opened = Recording(folder)
        opened.training.verify()
        opened.held_out.verify()
    training, held_out = description.training, description.held_out
    return RecordingSummary(
        folder=str(folder),
        complete=description.complete,
        covers=description.covers,
        method=training.method,
        draws=training.tokens,
        power=training.power,
        temperature=training.temperature,
        hidden_layers=list(training.hidden_layers),
        sequences=training.sequences,
        tokens=training.positions,
        bytes=training.bytes,
        held_out_sequences=held_out.sequences,
        held_out_tokens=held_out.positions,
        held_out_bytes=held_out.bytes,
        inputs=description.inputs,
        verified=verify,
    )


def table_of_parts(training: tuple[int, int, int], held_out: tuple[int, int, int]) -> list[list[str]]:
    """Rows of a table: part, sequences, tokens, size, bytes a token; of (sequences, tokens, bytes) of each part."""
    parts = (("training", training), ("held-out", held_out))
    return [
        [name, f"{sequences:,}", f"{tokens:,}", megabytes(size), f"{size / max(tokens, 1):,.1f}"]
        for name, (sequences, tokens, size) in parts
    ]


def show(result: RecordingSummary) -> list[RenderableType]:
    """The recording, for people."""
    training = (result.sequences, result.tokens, result.bytes)
    held_out = (result.held_out_sequences, result.held_out_tokens, result.held_out_bytes)
    how = f"{result.method}, {result.draws} tokens of each distribution, temperature {result.temperature:g}"
    layers = f"; hidden states of layers {', '.join(map(str, result.hidden_layers))}" if result.hidden_layers else ""
    state = "" if result.complete else ", not finished"
    columns = ["part", "sequences", "tokens", "size", "bytes a token"]
    lines: list[RenderableType] = [
        table(f"Recording {result.folder}{state}", columns, table_of_parts(training, held_out), f"{how}{layers}")
    ]
    lines += [f"{name}: {recording.shortened(value)}" for name, value in result.inputs.items()]
    if result.verified:
        lines.append("verified: every sequence")
    return lines
