"""The header of a packed folder, and the checks that it does not contradict itself or the stored tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from edgerazor import formats
from edgerazor.formats import BLOCK_FORMATS, ROW_FORMATS, TAIL
from edgerazor.packed.compression import LARGEST_RATIO, NARROWEST
from edgerazor.packed.container import DTYPES, TensorSpec, spec_bytes

#: The latest version that this program reads and writes.
VERSION = 4


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1 << 62


#: The fields of `Header.settings`, which say how to compute, and the check of the value of each.
SETTINGS: dict[str, Callable[[Any], bool]] = {
    "activation_bits": lambda bits: type(bits) is int and bits in (4, 5, 6, 7, 8, 16),
    "kv_bits": lambda bits: type(bits) is int and bits in (4, 8, 16),
    "group_size": lambda size: type(size) is int and 0 < size < 1 << 62,
    "query_bits": lambda bits: type(bits) is int and bits in (4, 8, 16),
    "probability_bits": lambda bits: type(bits) is int and bits in (4, 8, 16),
    "adaptive_tokens": lambda mode: mode in ("off", "causal", "ranked"),
    "thresholds": lambda values: isinstance(values, list) and all(map(_is_number, values)),
}
#: Name of the tensor that holds all digests and checksums, and bytes of each.
CHECKSUMS, SHA256_BYTES = "edgerazor.sha256", 32
#: Beginning of the name of a tensor that holds the signs of a rotation; the number of columns follows.
SIGNS = "edgerazor.signs."
#: End of the name of a tensor that holds a compressed part.
FRAME = ".zst"
#: Stands for a digest or checksum where only its length matters.
ANY_SHA256 = "0" * 2 * SHA256_BYTES

Kind = Literal["linear", "embedding", "head", "tower"]


class Strict(BaseModel):
    """A model that converts no values and refuses unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class MatrixEntry(Strict):
    """One quantized matrix. `sha256` has that of each part, codes with their scales, before compression."""

    kind: Kind
    formats: tuple[str, ...] = Field(min_length=1)
    group_size: int = Field(ge=1)
    shape: tuple[int, int]
    digest: str
    sha256: dict[str, str]

    def code_parts(self) -> list[str]:
        """Names of the parts that hold codes."""
        return [part for part in self.sha256 if is_compressed(part)]

    def code_rows(self) -> dict[str, int]:
        """The number of rows of all parts of codes together: rows of the matrix, or its whole groups and its tails."""
        rows, cols = self.shape
        if BLOCK_FORMATS not in self.sha256:
            return {"rows": rows}
        group = min(self.group_size, cols)
        return {"groups": rows * (cols // group), "tails": rows if cols % group else 0}

    def code_columns(self, part: str) -> int:
        """The number of codes in a row of a part: those of a row of the matrix, or of a group."""
        cols = self.shape[1]
        if BLOCK_FORMATS not in self.sha256:
            return cols
        group = min(self.group_size, cols)
        return cols % group if part.endswith(TAIL) else group


class TensorEntry(Strict):
    """One tensor that is not quantized."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str


class Compression(Strict):
    """How parts of codes and scales are compressed. `filter` is the version of `formats/core/streams.py`."""

    method: Literal["zstd"] = "zstd"
    filter: Literal[1] = 1


class ModelFields(Strict):
    """The fields of a header that hold for the whole model."""

    version: Literal[1, 2, 3, 4] = 1
    tied: dict[str, str]
    settings: dict[str, JsonValue]
    provenance: dict[str, JsonValue]
    extras: dict[str, JsonValue] = Field({}, description="what a program of this version may ignore")
    compression: Compression | None = Field(None, description="left out where nothing is compressed")
    rotations: dict[str, int] = Field(
        {}, description="columns -> block of rotated matrices; left out where there are none"
    )

    def tensor_name(self, matrix: str, part: str) -> str:
        """Name of the tensor that holds a part of a matrix as it is stored here."""
        return part_name(matrix, part) + (FRAME if self.compression and is_compressed(part) else "")


class Header(ModelFields):
    """What a packed folder holds and how it was made, with all checksums."""

    matrices: dict[str, MatrixEntry]
    others: dict[str, TensorEntry]
    signs: dict[str, str] = Field({}, description="columns of rotated matrices, ascending -> SHA-256 of their signs")


def has_towers(matrices: Mapping[str, MatrixEntry]) -> bool:
    """Whether one of these matrices is a tower's, which a program for version 3 would not know."""
    return any(entry.kind == "tower" for entry in matrices.values())


def has_zero_points(others: Iterable[str]) -> bool:
    """Whether one of these tensors is a zero point of inputs, which a program for version 1 would ignore."""
    return any(name.rpartition(".")[2] in (formats.INPUT_ZERO_POINT, formats.LOW_INPUT_ZERO_POINT) for name in others)


def signs_name(columns: int | str) -> str:
    """Name of the tensor that holds the signs of the rotation of so many columns."""
    return f"{SIGNS}{columns}"


def signs_specs(columns: Iterable[int | str]) -> dict[str, TensorSpec]:
    """Name -> dtype and shape of the signs of these rotations."""
    return {signs_name(number): ("U8", (formats.sign_bytes(int(number)),)) for number in columns}


def in_columns_order(columns: Iterable[str]) -> list[str]:
    """Numbers of columns, as text, ascending."""
    return sorted(columns, key=int)


def is_compressed(part: str) -> bool:
    """Whether a part is a frame where the folder is compressed: it holds codes and scales.

    The other parts hold format indices, which say how large the parts of codes are.
    """
    return part not in (ROW_FORMATS, BLOCK_FORMATS)


def part_name(matrix: str, part: str) -> str:
    """Name of the tensor that holds one part of a matrix."""
    return f"{matrix}.weight.{part}"


def make_header(
    matrices: Mapping[str, MatrixEntry],
    others: Mapping[str, TensorEntry],
    tied: Mapping[str, str],
    settings: Mapping[str, Any],
    provenance: Mapping[str, Any],
    extras: Mapping[str, Any] | None = None,
    compression: Compression | None = None,
    rotations: Mapping[int, int] | None = None,
    signs: Mapping[int, str] | None = None,
) -> Header:
    """A header with all names in order.

    Args:
        matrices, others, tied, settings, provenance, extras, compression: its fields.
        rotations: number of columns -> block of the rotated matrices.
        signs: number of columns -> SHA-256 of the signs of each rotation.

    Raises:
        ValueError: it contradicts itself.
    """
    header = Header(
        version=4 if has_towers(matrices) else 3 if rotations else 2 if has_zero_points(others) else 1,
        matrices=dict(sorted(matrices.items())),
        others=dict(sorted(others.items())),
        tied=dict(sorted(tied.items())),
        settings=dict(settings),
        provenance=dict(provenance),
        extras=dict(extras or {}),
        compression=compression,
        rotations={str(columns): block for columns, block in sorted((rotations or {}).items())},
        signs={str(columns): sha for columns, sha in sorted((signs or {}).items())},
    )
    problem = header_problem(header)
    if problem:
        raise ValueError(problem)
    return header


def expected_tensors(header: Header, stored: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """Dtype and shape of each tensor that a header describes, apart from the tensor of checksums.

    Args:
        header: of the folder.
        stored: dtype and shape of all stored tensors. The number of rows of each format is known only from them;
            `rows_problem` checks it.
    """
    expected = {name: (entry.dtype, entry.shape) for name, entry in header.others.items()}
    expected |= signs_specs(header.rotations)
    for name, entry in header.matrices.items():
        rows, cols = entry.shape
        alike = stored.get(part_name(name, BLOCK_FORMATS), ("", ()))[1][:1] == (1,)
        groups = formats.group_count(cols, entry.group_size)
        parts: dict[str, tuple[int, ...]] = {
            ROW_FORMATS: (1, formats.index_row_bytes(rows, len(entry.formats))),
            BLOCK_FORMATS: (1 if alike else rows, formats.index_row_bytes(groups, len(entry.formats))),
        }
        for part in entry.code_parts():
            size = math.prod(stored.get(header.tensor_name(name, part), ("", ()))[1])
            parts[part] = (size if header.compression else _row_blocks(entry, part, size)[1],)
        expected |= {header.tensor_name(name, part): ("U8", parts[part]) for part in entry.sha256}
    return expected


def _row_blocks(entry: MatrixEntry, part: str, size: int) -> tuple[int, int]:
    """The number of row blocks of a part that is stored in `size` bytes, and the bytes that these should take."""
    return formats.stored_row_blocks(size, part, entry.code_columns(part), entry.group_size)


def rows_problem(entry: MatrixEntry, stored: Mapping[str, TensorSpec], name: str) -> str:
    """What is wrong with the numbers of row blocks in a matrix's parts, or an empty string."""
    blocks = {
        part: _row_blocks(entry, part, spec_bytes(stored[part_name(name, part)]))[0] for part in entry.code_parts()
    }
    for kind, rows in entry.code_rows().items():
        counts = [count for part, count in blocks.items() if part.endswith(TAIL) == (kind == "tails")]
        most = sum(counts) * formats.ROWS
        # The last block of each part may hold any number of rows from 1 to 16.
        if not most - len(counts) * (formats.ROWS - 1) <= rows <= most or 0 in counts:
            return f"its formats have {sum(counts)} blocks of {kind} together, but it has {rows} {kind}"
    return ""


def frames_problem(entry: MatrixEntry, stored: Mapping[str, TensorSpec], name: str) -> str:
    """What is wrong with the sizes of a matrix's frames, or an empty string.

    The number of rows in each frame is not known yet, so all codes count as those of the narrowest format.
    """
    frames = sum(spec_bytes(stored[part_name(name, part) + FRAME]) for part in entry.code_parts())
    least = math.prod(entry.shape) // NARROWEST
    return f"its frames are too small for {math.prod(entry.shape)} codes" if frames * LARGEST_RATIO < least else ""


def header_problem(header: Header) -> str:
    """What makes a header contradict itself, or an empty string."""
    for name, entry in header.matrices.items():
        if problem := _matrix_problem(entry):
            return f"{name}: {problem}"
    if all(entry.kind != "linear" for entry in header.matrices.values()):
        return "it has no quantized linear layer"
    for name, other in header.others.items():
        if other.dtype not in DTYPES:
            return f"{name} has the unknown dtype {other.dtype}"
        if any(size < 0 for size in other.shape):
            return f"{name} has the impossible shape {list(other.shape)}"
    parts = {header.tensor_name(name, part) for name, entry in header.matrices.items() for part in entry.sha256}
    if header.version == 1 and has_zero_points(header.others):
        return "it has zero points of inputs, which version 1 does not know"
    if has_towers(header.matrices) and header.version < 4:
        return f"it has matrices of a tower, which version {header.version} does not know"
    if header.rotations and header.version < 3:
        return f"it has rotations, which version {header.version} does not know"
    if problem := _rotations_problem(header.rotations, {entry.shape[1] for entry in header.matrices.values()}):
        return problem
    for name in sorted(signs_specs(header.rotations).keys() & header.others.keys()):
        return f"{name} is the name of the signs of a rotation, not of a tensor of its own"
    if CHECKSUMS in header.others:
        return f"{CHECKSUMS} is the name of the checksums, not of a tensor of its own"
    for name in sorted(parts & header.others.keys()):
        return f"{name} is both a part of a matrix and a tensor of its own"
    for name, target in header.tied.items():
        if target not in header.matrices or name in header.matrices:
            return f"{name} is tied to {target}, but only a matrix can be shared, by a module that has none"
    for name, value in header.settings.items():
        if name not in SETTINGS or not SETTINGS[name](value):
            return f"its setting {name} cannot be {str(value)[:50]}"
    return ""


def _rotations_problem(rotations: Mapping[str, int], columns: set[int]) -> str:
    """What is wrong with the rotations of matrices of these numbers of columns, or an empty string."""
    for number, block in rotations.items():
        if number not in set(map(str, columns)):
            return f"it has a rotation of {number:.50} columns, but no matrix of so many"
        if problem := formats.block_problem(block, int(number)):
            return problem
    return ""


def _matrix_problem(entry: MatrixEntry) -> str:
    known = formats.names()
    unknown = [name for name in entry.formats if name not in known]
    if unknown:
        return f"it has the unknown format {unknown[0]}"
    choices = {ROW_FORMATS, BLOCK_FORMATS} & set(entry.sha256)
    if len(set(entry.formats)) < len(entry.formats) or (len(entry.formats) > 1 and len(choices) != 1):
        return "its list of formats repeats one, or does not say which row has which"
    if min(entry.shape) < 1 or math.prod(entry.shape) >= 1 << 62 or entry.group_size >= 1 << 62:
        return f"it has the impossible shape {list(entry.shape)}, or group size {entry.group_size}"
    cut = BLOCK_FORMATS in choices and entry.shape[1] % min(entry.group_size, entry.shape[1])
    tails = {f"{name}{TAIL}" for name in entry.formats} if cut else set()
    codes = set(entry.code_parts())
    if len(choices) > 1 or not codes or codes - {*entry.formats, *tails}:
        return "its parts are not those of a matrix"
    return ""
