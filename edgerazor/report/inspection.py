"""What is in a packed model: sizes, what it was made from, whether every byte is as it was written."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel
from rich.console import RenderableType
from rich.markdown import Markdown

from edgerazor import packed
from edgerazor.console import Console, megabytes, table
from edgerazor.errors import plain
from edgerazor.packed import ClassBits, PackedModel
from edgerazor.report.tables import CLASSES


class PackedSummary(BaseModel):
    """A packed folder.

    `rotations`: columns -> block of rotated matrices. `verified`: every checksum, code and digest was checked, which
    `--verify` asks for.
    """

    folder: str
    compressed: bool
    sizes: packed.SizeTable
    bits: list[ClassBits]
    settings: dict
    rotations: dict[str, int]
    provenance: dict
    verified: bool


def look_into(folder: Path, verify: bool, console: Console) -> PackedSummary:
    """Read a packed folder once, every matrix of it.

    Raises:
        UserError: something is damaged.
    """
    model = PackedModel.open(folder)
    header = model.header
    with console.track("verify" if verify else "read", len(header.matrices)) as tracker:
        bits = packed.bits_table(model, tracker.advance)
    if verify:
        model.others()
        model.input_scales()
    return PackedSummary(
        folder=str(folder),
        compressed=header.compression is not None,
        sizes=packed.size_table(model),
        bits=bits,
        settings=header.settings,
        rotations=header.rotations,
        provenance=header.provenance,
        verified=verify,
    )


def show_format() -> list[RenderableType]:
    """The specification of the packed format, for a terminal."""
    return [Markdown(packed.specification())]


def show(result: PackedSummary) -> list[RenderableType]:
    """The packed folder, for people."""
    rows = [
        [CLASSES[size.kind], f"{size.weights:,}"]
        + [f"{bits:.3f}" for bits in (size.nominal_bits, size.packed_bits, size.entropy_bits, size.stored_bits)]
        for size in result.bits
    ]
    how = "compressed, " if result.compressed else ""
    sizes = result.sizes
    caption = f"whole files: {megabytes(sizes.bytes)}, {sizes.real_bits:.3f} real bits; all in bits a weight"
    columns = ["tensors", "weights", "nominal", "packed", "entropy bound", "stored"]
    lines: list[RenderableType] = [table(f"Packed model, {how}{result.folder}", columns, rows, caption)]
    lines += [plain(f"{key}: {value}", 2000) for key, value in {**result.settings, **result.provenance}.items()]
    if result.rotations:
        ascending = sorted(result.rotations.items(), key=lambda rotation: int(rotation[0]))
        blocks = ", ".join(f"{columns} columns in blocks of {block}" for columns, block in ascending)
        lines.append(f"rotated by a signed Hadamard matrix: {blocks}")
    if result.verified:
        lines.append("verified: every checksum, code and digest")
    return lines
