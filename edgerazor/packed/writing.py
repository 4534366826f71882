"""Writing a packed folder, matrix by matrix: where each goes is known before the first is encoded."""

from __future__ import annotations

import contextlib
import errno
import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from edgerazor import formats, workdir
from edgerazor.formats import SCALES, Encoded, MatrixSpec
from edgerazor.packed.compression import compress as compressed
from edgerazor.packed.compression import largest_frame
from edgerazor.packed.container import SHARD_BYTES, WEIGHTS_FILE, File, TensorSpec, arrange, cut, sha256, tensor_spec
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
)
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

    Matrices are encoded on all cores and written as they come, so that only those in work are in memory.

    Args:
        folder: an existing folder without weight files.
        matrices: the quantized matrices.
        others: tensors that stay as they are, by name.
        tied: module path -> path of the module whose matrix it uses.
        settings: bits of activations and cache, as JSON values.
        provenance: teacher, data, recipe, seed, versions, as JSON values; no times, hosts or paths.
        shard_bytes: largest size of a file's tensor data, uncompressed; a single larger tensor gets a file of its own.
        done: called behind each matrix, from any thread.
        compress: store parts of codes and scales as zstd frames.
        extras: of the header.
        shards: file name -> names of its tensors, uncompressed; instead of those that `shard_bytes` gives.

    Raises:
        ValueError: two tensors have the same name, there is no linear matrix, or a dtype cannot be stored.
        OSError: the disk is full or cannot be written; nothing is left behind.
        UserError: another process is writing there.
    """
    about = [(each.name, each.kind, each.spec, each.shape) for each in matrices]
    specs, entries = _tensors(about, {name: tensor_spec(name, tensor) for name, tensor in others.items()})
    shards = shards or cut(specs, shard_bytes)
    make = functools.partial(
        make_header,
        tied=tied,
        settings=settings,
        provenance=provenance,
        extras=extras,
        compression=Compression() if compress else None,
    )
    tensors = {
        name: _tensor_entry(*specs[name], sha256([formats.tensor_bytes(tensor)])) for name, tensor in others.items()
    }
    header = make(entries, tensors)
    growing = _growing(matrices, specs, shards, header) if compress else None

    def files() -> list[File]:
        about = header_metadata(header)
        return growing.files(about) if growing else arrange(specs, about, shards)

    with _opened(folder, files()) as place:
        for name, tensor in others.items():
            place(name, [formats.tensor_bytes(tensor)])
        put = _Frames(growing, place) if growing else _Parts(place)

        def work(number: int, matrix: MatrixSource) -> None:
            with put.turns.task(number):
                entries[matrix.name] = _write_matrix(number, matrix, put)

        ordered = sorted(matrices, key=lambda matrix: (-math.prod(matrix.shape), matrix.name))
        tasks = enumerate(ordered)
        in_parallel([(math.prod(each.shape), functools.partial(work, number, each)) for number, each in tasks], done)
        header = make(entries, tensors)  # as long as before, now with true checksums
        place(CHECKSUMS, [formats.tensor_bytes(checksums(header))])
        place.begin(files())
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
    """What `write` would write, to the byte, without any data.

    Every digest and checksum has the same length, so any will do; so must those in `provenance`.

    Args:
        matrices: name, kind, formats and shape (rows, columns) of each quantized matrix.
        others: dtype and shape of the tensors that stay as they are, by name.
        tied, settings, provenance, shard_bytes: as for `write`.

    Raises:
        ValueError: as `write`.
    """
    specs, entries = _tensors(matrices, others)
    about = {name: _tensor_entry(*spec, ANY_SHA256) for name, spec in others.items()}
    header = make_header(entries, about, tied, settings, provenance)
    files = arrange(specs, header_metadata(header), cut(specs, shard_bytes))
    weights = sum(math.prod(e.shape) for e in entries.values()) + sum(math.prod(e.shape) for e in about.values())
    return FolderSize(sum(file.size for file in files), weights)


def working_memory(matrices: Iterable[tuple[MatrixSpec, tuple[int, int]]]) -> int:
    """Bytes that writing and verifying matrices of these formats and shapes takes at once, mapped files apart."""
    tasks = []
    for spec, shape in matrices:
        weights = math.prod(shape)
        uniform = spec.row_formats is None and spec.block_formats is None
        # The codes, int8; those of the rows of one format again; what is written.
        tasks.append((weights, weights * (1 if uniform else 2) + spec.packed_bytes(shape)))
    return at_once(tasks)


def _tensors(
    matrices: Iterable[tuple[str, Kind, MatrixSpec, tuple[int, int]]], others: Mapping[str, TensorSpec]
) -> tuple[dict[str, TensorSpec], dict[str, MatrixEntry]]:
    """All tensors of the folder, and the entries of its matrices with any checksums, all of which have one length."""
    specs: dict[str, TensorSpec] = {}
    entries: dict[str, MatrixEntry] = {}
    for name, kind, spec, shape in matrices:
        parts = formats.stored_shapes(spec, shape)
        entries[name] = _entry(kind, spec, shape, ANY_SHA256, dict.fromkeys(parts, ANY_SHA256))
        _add(specs, {part_name(name, part): ("U8", size) for part, size in parts.items()})
    count = len(specs) + len(entries) + len(others)
    _add(specs, others)
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


def _tensor_entry(dtype: str, shape: tuple[int, ...], sha256: str) -> TensorEntry:
    return TensorEntry(dtype=dtype, shape=shape, sha256=sha256)


def _growing(
    matrices: Iterable[MatrixSource],
    specs: Mapping[str, TensorSpec],
    shards: Mapping[str, Sequence[str]],
    header: Header,
) -> GrowingFiles:
    """The files of the same tensors, compressed."""
    stored = {name: name for name in specs}
    largest: dict[str, int] = {}
    for each in matrices:
        sizes = formats.stream_bytes(each.spec, each.shape)
        for part in header.matrices[each.name].code_parts():
            frame = header.tensor_name(each.name, part)
            stored[part_name(each.name, part)] = frame
            largest[frame] = largest_frame(sizes[part] + sizes[part + SCALES])
    known = {name: spec for name, spec in specs.items() if stored[name] == name}
    renamed = {file: [stored[name] for name in names] for file, names in shards.items()}
    return GrowingFiles(known, largest, renamed, header_metadata(header))


def _write_matrix(number: int, matrix: MatrixSource, put: _Parts | _Frames) -> MatrixEntry:
    """Encode a matrix, the one of that number, and write its parts; its entry in the header."""
    encoded = matrix.encode()
    digest = formats.digest(encoded, matrix.spec)
    parts = formats.joined(formats.pack_matrix(encoded, matrix.spec))
    sums = {part: sha256(pieces) for part, pieces in parts.items()}
    put(number, matrix, encoded, parts)
    return _entry(matrix.kind, matrix.spec, matrix.shape, digest, sums)


class _Parts:
    """Puts parts into their places as they are."""

    def __init__(self, place: _Places) -> None:
        self.place, self.turns = place, Turns()

    def __call__(self, number: int, matrix: MatrixSource, encoded: Encoded, parts: dict[str, list[memoryview]]) -> None:
        for part, pieces in parts.items():
            self.place(part_name(matrix.name, part), pieces)


class _Frames:
    """Compresses parts, codes with their scales, and appends them in the order of the matrices' numbers."""

    def __init__(self, files: GrowingFiles, place: _Places) -> None:
        self.files, self.place, self.turns = files, place, Turns()

    def __call__(self, number: int, matrix: MatrixSource, encoded: Encoded, parts: dict[str, list[memoryview]]) -> None:
        streams = formats.to_streams(encoded, matrix.spec)
        frames = {part: compressed(streams[part + SCALES], streams[part]) for part in parts if part in streams}
        with self.turns.turn(number):
            for part in sorted(parts):
                name = part_name(matrix.name, part)
                if part not in frames:
                    self.place(name, parts[part])
                    continue
                self.place.add(name + FRAME, *self.files.append(name + FRAME, len(frames[part])))
                self.place(name + FRAME, [memoryview(frames[part])])


class _Places:
    """Where each tensor goes in files that are open, under temporary names."""

    def __init__(self, files: Sequence[File], descriptors: Mapping[str, int]) -> None:
        self.descriptors = descriptors
        self.sizes = {file.name: len(file.beginning) for file in files}
        self.places = {
            name: (descriptors[file.name], len(file.beginning) + offset)
            for file in files
            for name, offset in file.offsets.items()
        }

    def __call__(self, name: str, pieces: Iterable[memoryview]) -> None:
        descriptor, offset = self.places[name]
        for piece in pieces:
            _write_at(descriptor, piece, offset)
            offset += len(piece)

    def add(self, name: str, file: str, offset: int) -> None:
        """One more tensor, whose data begin there behind the header of that file."""
        self.places[name] = (self.descriptors[file], self.sizes[file] + offset)

    def begin(self, files: Sequence[File]) -> None:
        """Write what stands before the tensors."""
        for file in files:
            assert len(file.beginning) == self.sizes[file.name]
            _write_at(self.descriptors[file.name], memoryview(file.beginning), 0)


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


@contextlib.contextmanager
def _opened(folder: Path, files: Sequence[File]) -> Iterator[_Places]:
    """Open temporary files of their full sizes; at the end they are synced and get their names, or disappear."""
    temporary = {file.name: folder / f".{file.name}.tmp" for file in files}
    descriptors: dict[str, int] = {}
    named: list[Path] = []
    with workdir.alone(folder / WEIGHTS_FILE):
        try:
            for file in files:
                descriptors[file.name] = os.open(temporary[file.name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
                _reserve(descriptors[file.name], file.size)
            yield _Places(files, descriptors)
            for descriptor in descriptors.values():
                os.fsync(descriptor)
            for name, path in temporary.items():
                os.replace(path, folder / name)
                named.append(folder / name)
            workdir.sync(folder)
        except BaseException as error:
            for path in (*temporary.values(), *named):
                path.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno and error.filename is None:
                error.filename = str(folder)  # of a descriptor the system does not know the name
            raise
        finally:
            for descriptor in descriptors.values():
                os.close(descriptor)


def _reserve(descriptor: int, size: int) -> None:
    """Take the space on the disk now, so that a full one is known before hours of work."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except AttributeError:  # not everywhere
        os.ftruncate(descriptor, size)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        os.ftruncate(descriptor, size)
