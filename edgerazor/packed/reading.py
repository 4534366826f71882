"""Reading a packed folder: every byte is checked before it is used."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgerazor import formats, untrusted, workdir
from edgerazor.errors import UserError
from edgerazor.formats import INPUT_SCALE, LOW_INPUT_SCALE, OF_INPUTS, SCALES, Encoded, MatrixSpec, Rotation
from edgerazor.packed.compression import decompress
from edgerazor.packed.container import TensorSpec, damaged_model, open_folder, sha256
from edgerazor.packed.description import read_header
from edgerazor.packed.header import (
    CHECKSUMS,
    SHA256_BYTES,
    Header,
    Kind,
    MatrixEntry,
    expected_tensors,
    frames_problem,
    is_compressed,
    part_name,
    rows_problem,
    signs_name,
)
from edgerazor.packed.threads import in_parallel
from edgerazor.packed.writing import MatrixSource
from edgerazor.untrusted import weights

#: The advice about a packed folder that names Python code.
NO_CODE = "No packed model needs any: pack the original again, and do not trust who made this one."

#: Bytes that are hashed and copied at a time, few enough to stay in a core's cache.
COPY_CHUNK = 1 << 18
#: Largest magnitude of a zero point: that of an activation's code.
LARGEST_ZERO_POINT = 127


@dataclass
class PackedMatrix:
    """A matrix that was read from a packed folder.

    Attributes:
        name: path of its module (`model.layers.0.mlp.down_proj`).
        kind: what the matrix is for.
        encoded: codes int8 [rows, cols] and scales float16 [rows, groups].
        spec: formats of its rows or blocks, and group size.
    """

    name: str
    kind: Kind
    encoded: Encoded
    spec: MatrixSpec

    def source(self) -> MatrixSource:
        """The matrix as `write` takes it, to be written into another folder."""
        rows, cols = self.encoded.codes.shape
        return MatrixSource(self.name, self.kind, self.spec, (rows, cols), lambda: self.encoded)


class PackedModel:
    """An open packed folder; tensors are mapped from disk and checked when they are read."""

    def __init__(self, folder: Path, header: Header, files: Mapping[str, Any], file_of: Mapping[str, str]) -> None:
        """Use `PackedModel.open`."""
        self.folder = folder
        self.header = header
        self._files = files  # file name -> open safetensors file
        self._file_of = file_of  # tensor name -> file name
        self._rotations: dict[int, Rotation] = {}

    @classmethod
    def open(cls, folder: Path) -> PackedModel:
        """Open a packed folder, checking everything but the bytes of the tensors.

        Where another process is replacing the folder, the old one or the new one is opened, never a mixture.

        Raises:
            UserError: a file is missing, cut off or no safetensors file, or what it holds is not a packed model of
                this version or contradicts its header; or a file beside the weights names Python code.
        """
        return workdir.read_whole(folder, cls._open)

    @classmethod
    def _open(cls, folder: Path) -> PackedModel:
        untrusted.refuse_code(folder, NO_CODE)
        files, file_of = open_folder(folder)
        first, opened = next(iter(files.items()))
        metadata = opened.metadata() or {}
        read_checksums = functools.partial(_read_checksums, files, file_of)
        header = read_header(folder / first, metadata, file_of.keys(), read_checksums)
        model = cls(folder, header, files, file_of)
        model._check_tensors()
        return model

    def matrix(self, name: str) -> PackedMatrix:
        """Read one quantized matrix, checking its checksums, codes, scales and digest.

        Raises:
            UserError: something about it is wrong.
            ValueError: there is no matrix of that name.
        """
        entry = self._entry(name)
        try:
            encoded, spec = formats.unpack_matrix(self.parts(name), entry.formats, entry.group_size, entry.shape)
        except ValueError as error:
            raise self._broken(name, str(error)) from None
        if formats.digest(encoded, spec) != entry.digest:
            raise self._broken(name, "its codes and scales do not have the recorded digest")
        return PackedMatrix(name, entry.kind, encoded, self._with_rotation(name, spec))

    def parts(self, name: str) -> dict[str, Tensor]:
        """The parts of a matrix, mapped from disk or decompressed into memory, their checksums checked.

        Raises:
            UserError: one of them is damaged.
            ValueError: there is no matrix of that name.
        """
        entry = self._entry(name)
        parts = self._decompressed(name) if self.header.compression else {}
        for part, sha in entry.sha256.items():
            if self.header.compression and is_compressed(part):
                continue
            stored = self._tensor(part_name(name, part), sha)
            parts |= self._deserialized(name, part, stored) if is_compressed(part) else {part: stored}
        return parts

    def _deserialized(self, name: str, part: str, stored: Tensor) -> dict[str, Tensor]:
        entry = self._entry(name)
        try:
            return formats.deserialize_part(stored, part, entry.code_columns(part), entry.group_size)
        except ValueError as error:
            raise self._broken(part_name(name, part), str(error)) from None

    def copy_parts(self, name: str, buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parts of codes and scales of a matrix, copied into memory; each byte is read once, for copy and checksum.

        Args:
            name: of the matrix.
            buffers: part of codes -> contiguous uint8, as many bytes as `formats.stored_shapes` says of the part.

        Returns:
            The parts as `parts` gives them, as views of that memory.

        Raises:
            UserError: one of them is damaged.
            ValueError: there is no matrix of that name, or a buffer has another size than its part.
        """
        decompressed = self.parts(name) if self.header.compression else {}
        parts: dict[str, Tensor] = {}
        for part, buffer in buffers.items():
            if decompressed:
                views = self._deserialized(name, part, buffer.zero_())
                for view_name, view in views.items():
                    view.copy_(decompressed[view_name])
            else:
                source = self._stored(part_name(name, part))
                if not source.nbytes == buffer.nbytes == buffer.numel() or not source.is_contiguous():
                    raise ValueError(f"{part} of {name} has {source.nbytes} bytes, its buffer {buffer.nbytes}")
                if _copy(source, buffer) != self._entry(name).sha256[part]:
                    raise self._broken(part_name(name, part), "its bytes do not have the recorded checksum")
                views = self._deserialized(name, part, buffer)
            parts |= views
        return parts

    def _decompressed(self, name: str) -> dict[str, Tensor]:
        """The parts of codes and scales of a compressed matrix; sizes follow from its formats, never from a frame."""
        entry, spec = self._entry(name), self.spec(name)
        streams: dict[str, Tensor] = {}
        try:
            sizes = formats.stream_bytes(spec, entry.shape)
            if {part for part in sizes if not part.endswith(SCALES)} != set(entry.code_parts()):
                raise ValueError("its parts are not those of its formats")
            for part in entry.code_parts():
                most = sizes[part] + sizes[part + SCALES]
                content = decompress(self._stored(self.header.tensor_name(name, part)), most)
                scales = formats.scale_stream_bytes(content, sizes[part + SCALES])
                streams[part + SCALES], streams[part] = content[:scales], content[scales:]
            parts = formats.from_streams(streams, spec, entry.shape)
        except ValueError as error:
            raise self._broken(name, str(error)) from None
        for part, pieces in formats.serialize_parts(parts).items():
            if sha256(pieces) != entry.sha256[part]:
                raise self._broken(self.header.tensor_name(name, part), "its bytes do not have the recorded checksum")
        return parts

    def spec(self, name: str) -> MatrixSpec:
        """Formats of the rows or blocks of a matrix, without reading its codes.

        Raises:
            UserError: the part with the format indices is damaged.
            ValueError: there is no matrix of that name.
        """
        entry = self._entry(name)
        parts = {
            part: self._tensor(part_name(name, part), sha)
            for part, sha in entry.sha256.items()
            if part in (formats.ROW_FORMATS, formats.BLOCK_FORMATS)
        }
        try:
            spec = formats.unpack_spec(parts, entry.formats, entry.group_size, entry.shape)
        except ValueError as error:
            raise self._broken(name, str(error)) from None
        return self._with_rotation(name, spec)

    def _with_rotation(self, name: str, spec: MatrixSpec) -> MatrixSpec:
        entry = self._entry(name)
        return spec if entry.kind == "tower" else replace(spec, rotation=self.rotation(entry.shape[1]))

    def rotation(self, columns: int) -> Rotation | None:
        """The rotation of matrices of so many columns, its signs checked; None where they are not rotated.

        Raises:
            UserError: the signs are damaged.
        """
        block = self.header.rotations.get(str(columns))
        if block is None:
            return None
        if columns not in self._rotations:
            name = signs_name(columns)
            try:
                signs = formats.unpack_signs(self._tensor(name, self.header.signs[str(columns)]), columns)
                self._rotations[columns] = Rotation(block, signs)
            except ValueError as error:
                raise self._broken(name, str(error)) from None
        return self._rotations[columns]

    def others(self) -> dict[str, Tensor]:
        """Read all tensors that are not quantized, checking their checksums.

        Raises:
            UserError: one of them is damaged, or holds a NaN or an infinity.
        """
        tensors = {name: self._tensor(name, entry.sha256) for name, entry in self.header.others.items()}
        weights.refuse_not_finite(self.folder, tensors.items())
        return tensors

    def input_scales(self) -> dict[str, float]:
        """The stored `P.input_scale` and `P.low_input_scale` of linear layers P, and their zero points, by name.

        Raises:
            UserError: one of them is damaged.
        """
        values = {}
        for name, entry in self.header.others.items():
            kind = name.rpartition(".")[2]
            if kind not in OF_INPUTS:
                continue
            tensor = self._tensor(name, entry.sha256)
            value = float(tensor) if tensor.dtype == torch.float32 and tensor.dim() == 0 else math.nan
            if kind in (INPUT_SCALE, LOW_INPUT_SCALE):
                if not 0 < value < math.inf:
                    raise self._broken(name, "it is not a positive float32 number")
            elif not (abs(value) <= LARGEST_ZERO_POINT and value.is_integer()):
                raise self._broken(name, f"it is not a whole float32 number of at most {LARGEST_ZERO_POINT}")
            values[name] = value
        return values

    def verify(self, done: Callable[[], None] | None = None) -> None:
        """Read and check everything once, on all cores.

        Args:
            done: called after each matrix, from any thread.

        Raises:
            UserError: something is damaged.
        """
        entries = self.header.matrices.items()
        in_parallel([(math.prod(entry.shape), functools.partial(self.matrix, name)) for name, entry in entries], done)
        self.others()

    def shards(self) -> dict[str, list[str]]:
        """File name -> names of its tensors, under their names in a folder that is not compressed."""
        uncompressed = {
            self.header.tensor_name(name, part): part_name(name, part)
            for name, entry in self.header.matrices.items()
            for part in entry.sha256
        }
        shards: dict[str, list[str]] = {file: [] for file in self._files}
        for name, file in self._file_of.items():
            shards[file].append(uncompressed.get(name, name))
        return {file: sorted(names) for file, names in shards.items()}

    def tensor_shapes(self) -> dict[str, TensorSpec]:
        """Safetensors dtype name and shape of every stored tensor."""
        shapes = {}
        for name, file in self._file_of.items():
            shapes[name] = _spec(self._files[file], name)
        return shapes

    def files(self) -> list[Path]:
        """The weight files."""
        return [self.folder / name for name in self._files]

    def _entry(self, name: str) -> MatrixEntry:
        if name not in self.header.matrices:
            raise ValueError(f"the packed model has no matrix called {name}")
        return self.header.matrices[name]

    def _tensor(self, name: str, recorded: str) -> Tensor:
        tensor = self._stored(name)
        if sha256([formats.tensor_bytes(tensor)]) != recorded:
            raise self._broken(name, "its bytes do not have the recorded checksum")
        return tensor

    def _stored(self, name: str) -> Tensor:
        tensor: Tensor = self._files[self._file_of[name]].get_tensor(name)
        return tensor

    def _broken(self, name: str, reason: str) -> UserError:
        """The error about a tensor, or about a matrix; then the file is that of its first part."""
        if name in self.header.matrices:
            first = self.header.tensor_name(name, min(self._entry(name).sha256))
            return damaged_model(self.folder / self._file_of[first], f"{name}: {reason}")
        return damaged_model(self.folder / self._file_of[name], f"{name}: {reason}")

    def _check_tensors(self) -> None:
        """UserError unless names, dtypes and shapes of the stored tensors are those that the header describes."""
        stored = self.tensor_shapes()
        expected = expected_tensors(self.header, stored)
        for name in sorted(stored.keys() - expected.keys() - {CHECKSUMS}):
            raise damaged_model(self.folder / self._file_of[name], f"the tensor {name} does not belong to it")
        for name, spec in expected.items():
            if stored[name] != spec:
                raise self._broken(name, _mismatch(stored[name], spec))
        find_problem = frames_problem if self.header.compression else rows_problem
        for name, entry in self.header.matrices.items():
            if problem := find_problem(entry, stored, name):
                raise self._broken(name, problem)


def _copy(source: Tensor, buffer: Tensor) -> str:
    """Copy the bytes of a contiguous tensor and give their SHA-256; the interpreter lock is free meanwhile."""
    digest, view = hashlib.sha256(), formats.tensor_bytes(source)
    for start in range(0, len(view), COPY_CHUNK):
        piece = view[start : start + COPY_CHUNK]
        digest.update(piece)
        ctypes.memmove(buffer.data_ptr() + start, source.data_ptr() + start, len(piece))
    return digest.hexdigest()


def _read_checksums(files: Mapping[str, Any], file_of: Mapping[str, str], count: int) -> Tensor:
    """The tensor of so many checksums, uint8 [n, 32].

    Raises:
        ValueError: it is missing, or has another dtype or shape.
    """
    if CHECKSUMS not in file_of:
        raise ValueError(f"the tensor {CHECKSUMS} is missing")
    opened, expected = files[file_of[CHECKSUMS]], ("U8", (count, SHA256_BYTES))
    stored = _spec(opened, CHECKSUMS)
    if stored != expected:
        raise ValueError(f"{CHECKSUMS}: {_mismatch(stored, expected)}")
    checksums: Tensor = opened.get_tensor(CHECKSUMS)
    return checksums


def _spec(opened: Any, name: str) -> TensorSpec:
    view = opened.get_slice(name)
    return str(view.get_dtype()), tuple(view.get_shape())


def _mismatch(stored: TensorSpec, expected: TensorSpec) -> str:
    return f"it should be {expected[0]} {list(expected[1])}, but is {stored[0]} {list(stored[1])}"


def verify_digests(folder: Path, digests: Mapping[str, str]) -> None:
    """Check that a packed folder decodes to exactly the codes and scales whose digests training recorded.

    Args:
        folder: the packed folder.
        digests: matrix name -> `formats.digest`, one for each matrix of the folder.

    Raises:
        UserError: the folder is damaged, or a matrix differs, is missing, or has no recorded digest; it is named.
    """
    model = PackedModel.open(folder)
    for name in sorted(digests.keys() ^ model.header.matrices.keys()):
        holder = "training, but not in the packed model" if name in digests else "the packed model, but not in training"
        raise UserError(f"The matrix {name} is in {holder}.", "Run `edgerazor pack --force`.")
    for name, expected in digests.items():
        if model.header.matrices[name].digest != expected:
            raise UserError(
                f"The packed matrix {name} does not hold the codes and scales that training computed with.",
                "Run `edgerazor pack --force`; if that does not help, this is a bug worth reporting.",
            )
    model.verify()
