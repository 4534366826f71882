"""Writing a packed folder, matrix by matrix: where each one goes is known before the first is encoded."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from edgerazor import formats
from edgerazor.formats import SCALES, Encoded, MatrixSpec, Rotation
from edgerazor.packed.compression import compress as compress_streams
from edgerazor.packed.compression import largest_frame
from edgerazor.packed.container import SHARD_BYTES, File, TensorSpec, arrange, cut, sha256, tensor_spec
from edgerazor.packed.description import checksums, header_metadata
from edgerazor.packed.growing import GrowingFiles, Turns
from edgerazor.packed.header import (
    ANY_SHA256,
    CHECKSUMS,
    FRAME,
    SHA256_BYTES,
    Compression,
    Header,
    Kind,
    MatrixEntry,
    TensorEntry,
    make_header,
    part_name,
    signs_name,
    signs_specs,
)
from edgerazor.packed.output_files import OutputFiles, open_output
from edgerazor.packed.threads import at_once, in_parallel


@dataclass(frozen=True)
class MatrixSource:
    """A matrix on its way into a packed folder.

    Attributes:
        name: path of its module (`model.layers.0.mlp.down_proj`).
        kind: what the matrix is for.
        spec: formats of its rows or blocks, and group size.
        shape: rows and columns.
        encode: gives its codes int8 [rows, cols] and scales float16 [rows, groups]; called once, from any thread.
    """

    name: str
    kind: Kind
    spec: MatrixSpec
    shape: tuple[int, int]
    encode: Callable[[], Encoded]


class FolderSize(NamedTuple):
    """Size of a packed folder: `bytes` of its weight files and their index, and the number of all `weights`."""

    bytes: int
    weights: int

    @property
    def real_bits(self) -> float:
        """8 * bytes / weights."""
        return 8 * self.bytes / self.weights


# Eleven parameters: a folder's contents, the fields of its header, and how to write it, all given by name.
def write(
    folder: Path,
    matrices: Sequence[MatrixSource],
    others: Mapping[str, Tensor],
    *,
    tied: Mapping[str, str],
    settings: Mapping[str, Any],
    provenance: Mapping[str, Any],
    shard_bytes: int = SHARD_BYTES,
    done: Callable[[], None] | None = None,
    compress: bool = False,
    extras: Mapping[str, Any] | None = None,
    shards: Mapping[str, Sequence[str]] | None = None,
) -> Header:
    """Write the weight files of a packed model; equal arguments give equal bytes.

    Matrices are encoded on all cores, and each is written when it is ready, so that memory holds only those in work.

    Args:
        folder: an existing folder without weight files.
        matrices: the quantized matrices.
        others: tensors that are not quantized, by name.
        tied: module path -> path of the module whose matrix it uses.
        settings: bits of activations and cache, as JSON values.
        provenance: teacher, data, recipe, seed, versions, as JSON values; no times, hosts or paths.
        shard_bytes: largest size of a file's tensor data, uncompressed; a single larger tensor gets a file of its own.
        done: called after each matrix, from any thread.
        compress: store parts of codes and scales as zstd frames.
        extras: of the header.
        shards: file name -> names of its tensors, uncompressed; instead of those that `shard_bytes` gives.

    Raises:
        ValueError: two tensors have the same name, there is no linear matrix, a dtype cannot be stored, or matrices of
            as many columns do not have the same rotation.
        OSError: the disk is full or cannot be written; nothing is left behind.
        UserError: another process is writing there.
    """
    rotations = _rotations((matrix.spec, matrix.shape) for matrix in matrices if matrix.kind != "tower")
    specs, entries = _tensors(
        [(matrix.name, matrix.kind, matrix.spec, matrix.shape) for matrix in matrices],
        {name: tensor_spec(name, tensor) for name, tensor in others.items()},
        rotations,
    )
    signs = {columns: formats.pack_signs(rotation.signs) for columns, rotation in rotations.items()}
    shards = shards or cut(specs, shard_bytes)
    compression = Compression() if compress else None
    make = functools.partial(
        make_header,
        tied=tied,
        settings=settings,
        provenance=provenance,
        extras=extras,
        compression=compression,
        rotations=_blocks(rotations),
        signs={columns: sha256([formats.tensor_bytes(tensor)]) for columns, tensor in signs.items()},
    )
    tensors = _other_entries(others)
    header = make(entries, tensors)
    growing = _growing_files(matrices, specs, shards, header) if compress else None
    with open_output(folder, _files(header, specs, shards, growing)) as output:
        for name, tensor in others.items():
            output.write(name, [formats.tensor_bytes(tensor)])
        for columns, tensor in signs.items():
            output.write(signs_name(columns), [formats.tensor_bytes(tensor)])
        header = make(_write_matrices(matrices, output, growing, done), tensors)  # as long as before, sums are known
        output.write(CHECKSUMS, [formats.tensor_bytes(checksums(header))])
        output.write_headers(_files(header, specs, shards, growing))
    return header


def predict(
    matrices: Iterable[tuple[str, Kind, MatrixSpec, tuple[int, int]]],
    others: Mapping[str, TensorSpec],
    *,
    tied: Mapping[str, str],
    settings: Mapping[str, Any],
    provenance: Mapping[str, Any],
    shard_bytes: int = SHARD_BYTES,
) -> FolderSize:
    """The exact size of what `write` would write, without any data.

    All digests and checksums have the same length, so it needs none of them; those in `provenance` must have their
    final length, too.

    Args:
        matrices: name, kind, formats and shape (rows, columns) of each quantized matrix.
        others: dtype and shape of the tensors that stay as they are, by name.
        tied, settings, provenance, shard_bytes: as for `write`.

    Raises:
        ValueError: as `write`.
    """
    matrices = list(matrices)
    rotations = _rotations((spec, shape) for _, kind, spec, shape in matrices if kind != "tower")
    specs, entries = _tensors(matrices, others, rotations)
    tensors = {name: TensorEntry(dtype=spec[0], shape=spec[1], sha256=ANY_SHA256) for name, spec in others.items()}
    signs = dict.fromkeys(rotations, ANY_SHA256)
    header = make_header(entries, tensors, tied, settings, provenance, rotations=_blocks(rotations), signs=signs)
    files = arrange(specs, header_metadata(header), cut(specs, shard_bytes))
    weights = sum(math.prod(entry.shape) for entry in entries.values())
    weights += sum(math.prod(tensor.shape) for tensor in tensors.values())
    return FolderSize(sum(file.size for file in files), weights)


def working_memory(matrices: Iterable[tuple[MatrixSpec, tuple[int, int]]]) -> int:
    """Peak memory, in bytes, of writing and verifying matrices of these formats and shapes, without mapped files."""
    tasks = []
    for spec, shape in matrices:
        weights = math.prod(shape)
        uniform = spec.row_formats is None and spec.block_formats is None
        # The int8 codes, a copy of those of the rows of one format, and the bytes that are written.
        rotated = 8 * weights if spec.rotation else 0  # a teacher's weight in float32, before and behind it
        tasks.append((weights, weights * (1 if uniform else 2) + spec.packed_bytes(shape) + rotated))
    return at_once(tasks)


def _rotations(matrices: Iterable[tuple[MatrixSpec, tuple[int, int]]]) -> dict[int, Rotation]:
    """Number of columns -> the rotation of all matrices of so many, where they are rotated.

    Raises:
        ValueError: they have different ones, or one of another number of columns.
    """
    known: dict[int, Rotation | None] = {}
    for spec, (_, columns) in matrices:
        rotation = known.setdefault(columns, spec.rotation)
        if (rotation is None) != (spec.rotation is None) or not (rotation is None or rotation.equals(spec.rotation)):
            raise ValueError(f"matrices of {columns} columns do not have the same rotation")
        if rotation is not None and rotation.columns != columns:
            raise ValueError(f"a matrix of {columns} columns has a rotation of {rotation.columns}")
    return {columns: rotation for columns, rotation in known.items() if rotation is not None}


def _blocks(rotations: Mapping[int, Rotation]) -> dict[int, int]:
    """Number of columns -> block."""
    return {columns: rotation.block for columns, rotation in rotations.items()}


def _tensors(
    matrices: Iterable[tuple[str, Kind, MatrixSpec, tuple[int, int]]],
    others: Mapping[str, TensorSpec],
    rotations: Iterable[int],
) -> tuple[dict[str, TensorSpec], dict[str, MatrixEntry]]:
    """All tensors of the folder, and the entries of its matrices with checksums that have only the right length."""
    specs: dict[str, TensorSpec] = {}
    entries: dict[str, MatrixEntry] = {}
    for name, kind, spec, shape in matrices:
        parts = formats.stored_shapes(spec, shape)
        entries[name] = _entry(kind, spec, shape, ANY_SHA256, dict.fromkeys(parts, ANY_SHA256))
        _add(specs, {part_name(name, part): ("U8", size) for part, size in parts.items()})
    signs = signs_specs(rotations)
    count = len(specs) + len(entries) + len(others) + len(signs)
    _add(specs, others)
    _add(specs, signs)
    _add(specs, {CHECKSUMS: ("U8", (count, SHA256_BYTES))})
    return specs, entries


def _add(tensors: dict[str, TensorSpec], more: Mapping[str, TensorSpec]) -> None:
    for name, tensor in more.items():
        if name in tensors:
            raise ValueError(f"two tensors are called {name}")
        tensors[name] = tensor


def _entry(kind: Kind, spec: MatrixSpec, shape: tuple[int, int], digest: str, sums: Mapping[str, str]) -> MatrixEntry:
    return MatrixEntry(
        kind=kind,
        formats=spec.formats,
        group_size=spec.group_size,
        shape=shape,
        digest=digest,
        sha256=dict(sorted(sums.items())),
    )


def _other_entries(others: Mapping[str, Tensor]) -> dict[str, TensorEntry]:
    """Header entries of the tensors that are not quantized."""
    entries = {}
    for name, tensor in others.items():
        dtype, shape = tensor_spec(name, tensor)
        entries[name] = TensorEntry(dtype=dtype, shape=shape, sha256=sha256([formats.tensor_bytes(tensor)]))
    return entries


def _files(
    header: Header,
    specs: Mapping[str, TensorSpec],
    shards: Mapping[str, Sequence[str]],
    growing: GrowingFiles | None,
) -> list[File]:
    """The files of the folder without their data, with as many tensors as are known by now."""
    metadata = header_metadata(header)
    return growing.files(metadata) if growing else arrange(specs, metadata, shards)


def _growing_files(
    matrices: Iterable[MatrixSource],
    specs: Mapping[str, TensorSpec],
    shards: Mapping[str, Sequence[str]],
    header: Header,
) -> GrowingFiles:
    """The files of the same tensors where parts of codes and scales are compressed."""
    stored = {name: name for name in specs}
    largest: dict[str, int] = {}
    for matrix in matrices:
        sizes = formats.stream_bytes(matrix.spec, matrix.shape)
        for part in header.matrices[matrix.name].code_parts():
            frame = header.tensor_name(matrix.name, part)
            stored[part_name(matrix.name, part)] = frame
            largest[frame] = largest_frame(sizes[part] + sizes[part + SCALES])
    known = {name: spec for name, spec in specs.items() if stored[name] == name}
    renamed = {file: [stored[name] for name in names] for file, names in shards.items()}
    return GrowingFiles(known, largest, renamed, header_metadata(header))


def _write_matrices(
    matrices: Iterable[MatrixSource],
    output: OutputFiles,
    growing: GrowingFiles | None,
    done: Callable[[], None] | None,
) -> dict[str, MatrixEntry]:
    """Encode and write all matrices on all cores, the largest first; gives their entries in the header."""
    entries: dict[str, MatrixEntry] = {}
    writer = _FrameWriter(growing, output) if growing else _PartWriter(output)

    def work(number: int, matrix: MatrixSource) -> None:
        with writer.turns.task(number):
            entries[matrix.name] = _write_matrix(number, matrix, writer)

    ordered = sorted(matrices, key=lambda matrix: (-math.prod(matrix.shape), matrix.name))
    tasks = enumerate(ordered)
    in_parallel([(math.prod(matrix.shape), functools.partial(work, number, matrix)) for number, matrix in tasks], done)
    return entries


def _write_matrix(number: int, matrix: MatrixSource, writer: _PartWriter | _FrameWriter) -> MatrixEntry:
    """Encode a matrix, the one of that number, and write its parts; gives its entry in the header."""
    encoded = matrix.encode()
    digest = formats.digest(encoded, matrix.spec)
    parts = formats.serialize_parts(formats.pack_matrix(encoded, matrix.spec))
    sums = {part: sha256(pieces) for part, pieces in parts.items()}
    writer.write(number, matrix, encoded, parts)
    return _entry(matrix.kind, matrix.spec, matrix.shape, digest, sums)


class _PartWriter:
    """Writes parts as they are."""

    def __init__(self, output: OutputFiles) -> None:
        self.output, self.turns = output, Turns()

    def write(self, number: int, matrix: MatrixSource, encoded: Encoded, parts: dict[str, list[memoryview]]) -> None:
        for part, pieces in parts.items():
            self.output.write(part_name(matrix.name, part), pieces)


class _FrameWriter:
    """Compresses parts, codes with their scales, and appends the frames in the order of the matrices' numbers."""

    def __init__(self, files: GrowingFiles, output: OutputFiles) -> None:
        self.files, self.output, self.turns = files, output, Turns()

    def write(self, number: int, matrix: MatrixSource, encoded: Encoded, parts: dict[str, list[memoryview]]) -> None:
        streams = formats.to_streams(encoded, matrix.spec)
        frames = {part: compress_streams(streams[part + SCALES], streams[part]) for part in parts if part in streams}
        with self.turns.turn(number):
            for part in sorted(parts):
                name = part_name(matrix.name, part)
                if part not in frames:
                    self.output.write(name, parts[part])
                    continue
                self.output.add(name + FRAME, *self.files.append(name + FRAME, len(frames[part])))
                self.output.write(name + FRAME, [memoryview(frames[part])])
