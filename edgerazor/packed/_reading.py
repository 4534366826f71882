"""A packed folder, opened and read; every byte is checked before it counts."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgerazor import formats
from edgerazor.errors import UserError
from edgerazor.formats import INPUT_SCALE, LOW_INPUT_SCALE, Encoded, MatrixSpec
from edgerazor.packed._compression import decompress
from edgerazor.packed._container import TensorSpec, damaged, open_folder
from edgerazor.packed._header import (
    Header,
    Kind,
    MatrixEntry,
    expected_tensors,
    frames_problem,
    is_compressed,
    part_name,
    read_header,
    rows_problem,
)
from edgerazor.packed._threads import in_parallel
from edgerazor.packed._writing import MatrixSource

#: Bytes that are hashed and copied while they are in a core's cache.
COPIED = 1 << 18


@dataclass
class PackedMatrix:
    """A matrix out of a packed folder.

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
        """The same matrix on its way into another folder."""
        rows, cols = self.encoded.codes.shape
        return MatrixSource(self.name, self.kind, self.spec, (rows, cols), lambda: self.encoded)


class PackedModel:
    """A packed folder, opened and checked; tensors are mapped from disk and checked when they are read."""

    def __init__(self, folder: Path, header: Header, files: Mapping[str, Any], where: Mapping[str, str]) -> None:
        """Use `PackedModel.open`."""
        self.folder = folder
        self.header = header
        self._files = files  # file name -> open safetensors file
        self._where = where  # tensor name -> file name

    @classmethod
    def open(cls, folder: Path) -> PackedModel:
        """Open a packed folder, checking everything but the bytes of the tensors.

        Raises:
            UserError: a file is missing, cut off or no safetensors file, or what it holds is not a packed model of
                this version or contradicts its header.
        """
        files, where = open_folder(folder)
        first, opened = next(iter(files.items()))
        model = cls(folder, read_header(folder / first, opened.metadata() or {}), files, where)
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
        return PackedMatrix(name, entry.kind, encoded, spec)

    def parts(self, name: str) -> dict[str, Tensor]:
        """The parts of a matrix, mapped from disk or decompressed into memory, their checksums checked.

        Raises:
            UserError: one of them is damaged.
            ValueError: there is no matrix of that name.
        """
        sums = self._entry(name).sha256
        if self.header.compression is None:
            return {part: self._tensor(part_name(name, part), sha) for part, sha in sums.items()}
        parts = self._decompressed(name)
        for part in sums:
            if part not in parts:  # a choice of formats: it is stored as it is
                parts[part] = self._tensor(part_name(name, part), sums[part])
        return parts

    def copy_parts(self, name: str, places: Mapping[str, Tensor]) -> None:
        """Copy parts of a matrix into memory, their checksums checked; every byte is read once.

        Args:
            name: of the matrix.
            places: part -> contiguous uint8, as large as the part.

        Raises:
            UserError: one of them is damaged.
            ValueError: there is no matrix of that name, or a place has another size than its part.
        """
        decompressed = self.parts(name) if self.header.compression else {}
        for part, place in places.items():
            from_file = part not in decompressed
            source = self._stored(part_name(name, part)) if from_file else decompressed[part]
            if not source.nbytes == place.nbytes == place.numel() or not source.is_contiguous():
                raise ValueError(f"{part} of {name} has {source.nbytes} bytes, its place {place.nbytes}")
            checksum = _copy(source, place)
            if from_file and checksum != self._entry(name).sha256[part]:
                raise self._broken(part_name(name, part), "its bytes do not have the recorded checksum")

    def _decompressed(self, name: str) -> dict[str, Tensor]:
        """The parts of codes and scales of a matrix, whose sizes follow from its formats, never from a frame."""
        entry, spec = self._entry(name), self.spec(name)
        try:
            sizes = formats.stream_bytes(spec, entry.shape)
            if sizes.keys() != {part for part in entry.sha256 if is_compressed(part)}:
                raise ValueError("its parts are not those of its formats")
            frames = {part: self._stored(self.header.tensor_name(name, part)) for part in sizes}
            streams = {part: decompress(frames[part], size) for part, size in sizes.items()}
            parts = formats.from_streams(streams, spec, entry.shape)
        except ValueError as error:
            raise self._broken(name, str(error)) from None
        for part, tensor in parts.items():
            if hashlib.sha256(formats.tensor_bytes(tensor)).hexdigest() != entry.sha256[part]:
                raise self._broken(self.header.tensor_name(name, part), "its bytes do not have the recorded checksum")
        return parts

    def spec(self, name: str) -> MatrixSpec:
        """Formats of the rows or blocks of a matrix, without reading its codes.

        Raises:
            UserError: what says so is damaged.
            ValueError: there is no matrix of that name.
        """
        entry = self._entry(name)
        chosen = {
            part: sha for part, sha in entry.sha256.items() if part in (formats.ROW_FORMATS, formats.BLOCK_FORMATS)
        }
        parts = {part: self._tensor(part_name(name, part), sha) for part, sha in chosen.items()}
        try:
            return formats.unpack_spec(parts, entry.formats, entry.group_size, entry.shape)
        except ValueError as error:
            raise self._broken(name, str(error)) from None

    def others(self) -> dict[str, Tensor]:
        """Read all tensors that are not quantized, checking their checksums.

        Raises:
            UserError: one of them is damaged.
        """
        return {name: self._tensor(name, entry.sha256) for name, entry in self.header.others.items()}

    def input_scales(self) -> dict[str, float]:
        """`P.input_scale` and `P.low_input_scale` of the linear layers P where they are stored.

        Raises:
            UserError: one of them is damaged.
        """
        found = {}
        for name, entry in self.header.others.items():
            if name.rpartition(".")[2] not in (INPUT_SCALE, LOW_INPUT_SCALE):
                continue
            scale = self._tensor(name, entry.sha256)
            if scale.dtype != torch.float32 or scale.dim() != 0 or not 0 < float(scale) < math.inf:
                raise self._broken(name, "it is not a positive float32 number")
            found[name] = float(scale)
        return found

    def verify(self, done: Callable[[], None] | None = None) -> None:
        """Read and check everything once, on all cores.

        Args:
            done: called behind each matrix, from any thread.

        Raises:
            UserError: something is damaged.
        """
        entries = self.header.matrices.items()
        in_parallel([(math.prod(entry.shape), functools.partial(self.matrix, name)) for name, entry in entries], done)
        self.others()

    def shards(self) -> dict[str, list[str]]:
        """File name -> names of its tensors, as they are called where nothing is compressed."""
        plain = {
            self.header.tensor_name(name, part): part_name(name, part)
            for name, entry in self.header.matrices.items()
            for part in entry.sha256
        }
        shards: dict[str, list[str]] = {file: [] for file in self._files}
        for name, file in self._where.items():
            shards[file].append(plain.get(name, name))
        return {file: sorted(names) for file, names in shards.items()}

    def tensor_shapes(self) -> dict[str, TensorSpec]:
        """Safetensors dtype name and shape of every stored tensor."""
        shapes = {}
        for name, file in self._where.items():
            view = self._files[file].get_slice(name)
            shapes[name] = (str(view.get_dtype()), tuple(view.get_shape()))
        return shapes

    def files(self) -> list[Path]:
        """The weight files."""
        return [self.folder / name for name in self._files]

    def _entry(self, name: str) -> MatrixEntry:
        if name not in self.header.matrices:
            raise ValueError(f"the packed model has no matrix called {name}")
        return self.header.matrices[name]

    def _tensor(self, name: str, sha256: str) -> Tensor:
        tensor = self._stored(name)
        if hashlib.sha256(formats.tensor_bytes(tensor)).hexdigest() != sha256:
            raise self._broken(name, "its bytes do not have the recorded checksum")
        return tensor

    def _stored(self, name: str) -> Tensor:
        tensor: Tensor = self._files[self._where[name]].get_tensor(name)
        return tensor

    def _broken(self, name: str, reason: str) -> UserError:
        """About a tensor, or about a matrix, whose first part then says which file it is in."""
        if name in self.header.matrices:
            first = self.header.tensor_name(name, min(self._entry(name).sha256))
            return damaged(self.folder / self._where[first], f"{name}: {reason}")
        return damaged(self.folder / self._where[name], f"{name}: {reason}")

    def _check_tensors(self) -> None:
        """Names, dtypes and shapes of the stored tensors are those that the header describes."""
        stored = self.tensor_shapes()
        expected = expected_tensors(self.header, stored)
        first = self.folder / next(iter(self._files))
        for name in sorted(expected.keys() - stored.keys()):
            raise damaged(first, f"the tensor {name} is missing")
        for name in sorted(stored.keys() - expected.keys()):
            raise damaged(self.folder / self._where[name], f"the tensor {name} does not belong to it")
        for name, (dtype, shape) in expected.items():
            if stored[name] != (dtype, shape):
                found = f"{stored[name][0]} {list(stored[name][1])}"
                raise self._broken(name, f"it should be {dtype} {list(shape)}, but is {found}")
        for name, entry in self.header.matrices.items():
            check = frames_problem if self.header.compression else rows_problem
            if problem := check(entry, stored, name):
                raise self._broken(name, problem)


def _copy(source: Tensor, place: Tensor) -> str:
    """Copies the bytes of a contiguous tensor and gives their SHA-256; the interpreter's lock is free meanwhile."""
    found, view = hashlib.sha256(), formats.tensor_bytes(source)
    for start in range(0, len(view), COPIED):
        piece = view[start : start + COPIED]
        found.update(piece)
        ctypes.memmove(place.data_ptr() + start, source.data_ptr() + start, len(piece))
    return found.hexdigest()


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
