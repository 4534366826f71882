"""The packed model folder, format version 0. (Version 0 is for use within one version of this program: no later
version promises to read it.)

**Container.** `model.safetensors`, or, when larger than the shard size, `model-00001-of-0000N.safetensors` ... with the
usual `model.safetensors.index.json` beside them. The safetensors format is 8 bytes of little-endian header length, a
JSON header with dtype, shape and place of every tensor, then the bytes of the tensors, row-major and little-endian,
without gaps. The header ends in spaces, so that the data begin on a 64-byte boundary.

**Matrices.** A quantized weight matrix [rows, cols] of the module at path P is stored as

- `P.weight.<format>`, U8 [rows of that format, packed columns]: the codes of its rows in that format, in row order.
  `ternary`: five codes a byte, the sum of (code_i + 1) * 3^i; a last byte is filled with codes 0; bytes above 242 are
  invalid. All others: code i is the two's-complement field of bits b*i to b*i+b-1 of the row's bytes, low bits first
  (int4: first code in the low nibble); unused bits are zero. Except in `int2`,
  the code -2^(b-1) occurs only with scales that do not follow from the format's rule.
- `P.weight.scales`, F16 [rows, ceil(cols / group_size)]: finite, not negative, in the matrix's row order.
- `P.weight.row_formats`, U8 [rows], only where rows may differ: an index into the matrix's list of formats.

Where the format may change within a row, it does so between groups, and the first and the last give way to

- `P.weight.<format>`, U8 [whole groups in that format, packed columns of a group], row by row: each group packed as if
  it were a row, so that it begins on a byte;
- `P.weight.<format>.tail`, U8 [rows whose shorter last group is in that format, packed columns of it], where
  group_size does not divide cols;
- `P.weight.block_formats`, U8 [rows, bytes], or [1, bytes] when all rows are alike: for each group of a row an index
  into the matrix's list of formats, in 1, 2 or 4 bits (the fewest that can count the list), low bits first.

A weight is `level(code) * scale` in float32; the level is the code, but `code + 1/2` in `int2`. Tensors of other kinds
(norms, biases) stand under their own names with their own dtypes. `P.input_scale`, F32 [], is the scale of all inputs
of the linear layer at P, and `P.low_input_scale` that of tokens with fewer bits; where one is missing, each group of
each such token has its own.

**Header.** The `__metadata__` of the first file holds `"edgerazor"`: a JSON object, fields as in `Header` below, and
`"edgerazor_sha256"`: the SHA-256 of that text. It names every tensor of the folder: per matrix its kind, formats, group
size, shape, the digest of codes and scales (`formats.digest`) and a SHA-256 of each part; dtype, shape and SHA-256 of
every other tensor; `tied`: modules that use the matrix of another; `settings`: how to compute (`SETTINGS` below);
`provenance`: what it was made from. Nothing in it differs between two equal runs.

**Reading trusts nothing.** Opening checks names, dtypes, shapes and places of all tensors; a tensor's bytes, codes and
digest are checked when it is first read. Anything wrong is a `UserError` of one sentence.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from safetensors import safe_open
from torch import Tensor

from edgerazor import formats, workdir
from edgerazor.errors import UserError
from edgerazor.formats import (
    BLOCK_FORMATS,
    INPUT_SCALE,
    LOW_INPUT_SCALE,
    ROW_FORMATS,
    SCALES,
    TAIL,
    Encoded,
    MatrixSpec,
)

VERSION = 0
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHARD_NAME = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
SHARD_BYTES = 4 * 10**9
ALIGNMENT = 64
#: How to compute, in `Header.settings`: fields of `surgery.Settings`.
SETTINGS = (
    "activation_bits",
    "kv_bits",
    "group_size",
    "query_bits",
    "probability_bits",
    "adaptive_tokens",
    "thresholds",
)
HEADER_KEY, HEADER_SUM_KEY = "edgerazor", "edgerazor_sha256"
#: In the place of a digest or checksum where only its length matters.
ANY_SHA256 = "0" * 64

#: Names of dtypes in a safetensors file.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Kind = Literal["linear", "embedding", "head"]
TensorClass = Literal["linear", "embedding", "head", "other"]
#: Name of the dtype in a safetensors file, and shape.
TensorSpec: TypeAlias = tuple[str, tuple[int, ...]]


# What is in the header --------------------------------------------------------------------------------------------


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class MatrixEntry(_Strict):
    """One quantized matrix."""

    kind: Kind
    formats: tuple[str, ...] = Field(min_length=1)
    group_size: int = Field(ge=1)
    shape: tuple[int, int]
    digest: str
    sha256: dict[str, str]


class TensorEntry(_Strict):
    """One tensor that is not quantized."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str


class Header(_Strict):
    """What the folder holds and how it came about."""

    version: Literal[0] = 0
    matrices: dict[str, MatrixEntry]
    others: dict[str, TensorEntry]
    tied: dict[str, str]
    settings: dict[str, JsonValue]
    provenance: dict[str, JsonValue]


@dataclass
class PackedMatrix:
    """A matrix on its way into a packed folder or out of one.

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


class FolderSize(NamedTuple):
    """Size of a packed folder: `bytes` of its weight files and their index, and the number of all `weights`."""

    bytes: int
    weights: int

    @property
    def real_bits(self) -> float:
        """8 * bytes / weights."""
        return 8 * self.bytes / self.weights


def part_name(matrix: str, part: str) -> str:
    """Name of the tensor that holds one part of a matrix."""
    return f"{matrix}.weight.{part}"


# Writing ----------------------------------------------------------------------------------------------------------


def write(
    folder: Path,
    matrices: Iterable[PackedMatrix],
    others: Mapping[str, Tensor],
    *,
    tied: Mapping[str, str],
    settings: Mapping[str, Any],
    provenance: Mapping[str, Any],
    shard_bytes: int = SHARD_BYTES,
) -> Header:
    """Write the weight files of a packed model; equal arguments give equal bytes.

    Args:
        folder: an existing folder without weight files.
        matrices: the quantized matrices; consumed one by one.
        others: tensors that stay as they are, by name.
        tied: module path -> path of the module whose matrix it uses.
        settings: bits of activations and cache, as JSON values.
        provenance: teacher, data, recipe, seed, versions, as JSON values; no times, hosts or paths.
        shard_bytes: largest size of a file's tensor data; a single larger tensor gets a file of its own.

    Raises:
        ValueError: two tensors have the same name, there is no linear matrix, or a dtype cannot be stored.
    """
    tensors: dict[str, Tensor] = {}
    entries: dict[str, MatrixEntry] = {}
    for matrix in matrices:
        parts = formats.pack_matrix(matrix.encoded, matrix.spec)
        rows, cols = matrix.encoded.codes.shape
        digest = formats.digest(matrix.encoded, matrix.spec)
        sums = {part: _sha256(tensor) for part, tensor in parts.items()}
        entries[matrix.name] = _matrix_entry(matrix.kind, matrix.spec, (rows, cols), digest, sums)
        _add(tensors, {part_name(matrix.name, part): tensor for part, tensor in parts.items()})
    _add(tensors, others)
    about = {name: _tensor_entry(tensor_spec(name, tensor), _sha256(tensor)) for name, tensor in others.items()}
    header = _header(entries, about, tied, settings, provenance)
    files = _layout({name: tensor_spec(name, tensor) for name, tensor in tensors.items()}, header, shard_bytes)
    for file in files:
        workdir.write_atomically(folder / file.name, functools.partial(_fill, file, tensors))
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
    specs: dict[str, TensorSpec] = {}
    entries: dict[str, MatrixEntry] = {}
    weights = 0
    for name, kind, spec, shape in matrices:
        parts = formats.part_shapes(spec, shape)
        entries[name] = _matrix_entry(kind, spec, shape, ANY_SHA256, dict.fromkeys(parts, ANY_SHA256))
        _add(specs, {part_name(name, part): (DTYPE_NAMES[dtype], size) for part, (dtype, size) in parts.items()})
        weights += math.prod(shape)
    _add(specs, others)
    about = {name: _tensor_entry(spec, ANY_SHA256) for name, spec in others.items()}
    files = _layout(specs, _header(entries, about, tied, settings, provenance), shard_bytes)
    weights += sum(math.prod(shape) for _, shape in others.values())
    return FolderSize(sum(len(file.beginning) + file.data for file in files), weights)


def tensor_spec(name: str, tensor: Tensor) -> TensorSpec:
    """Dtype and shape of a tensor to be stored under a name.

    Raises:
        ValueError: the dtype cannot be stored.
    """
    if tensor.dtype not in DTYPE_NAMES:
        raise ValueError(f"{name} has the dtype {tensor.dtype}, which cannot be stored")
    return DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)


def _matrix_entry(
    kind: Kind, spec: MatrixSpec, shape: tuple[int, int], digest: str, sums: Mapping[str, str]
) -> MatrixEntry:
    return MatrixEntry(
        kind=kind,
        formats=spec.formats,
        group_size=spec.group_size,
        shape=shape,
        digest=digest,
        sha256=dict(sorted(sums.items())),
    )


def _tensor_entry(spec: TensorSpec, sha256: str) -> TensorEntry:
    return TensorEntry(dtype=spec[0], shape=spec[1], sha256=sha256)


def _header(
    matrices: Mapping[str, MatrixEntry],
    others: Mapping[str, TensorEntry],
    tied: Mapping[str, str],
    settings: Mapping[str, Any],
    provenance: Mapping[str, Any],
) -> Header:
    header = Header(
        matrices=dict(sorted(matrices.items())),
        others=dict(sorted(others.items())),
        tied=dict(sorted(tied.items())),
        settings=dict(settings),
        provenance=dict(provenance),
    )
    problem = _header_problem(header)
    if problem:
        raise ValueError(problem)
    return header


def _add(tensors: dict[str, Any], more: Mapping[str, Any]) -> None:
    for name, tensor in more.items():
        if name in tensors:
            raise ValueError(f"two tensors are called {name}")
        tensors[name] = tensor


@dataclass(frozen=True)
class _File:
    """A weight file or the index: its beginning, and the tensors whose `data` bytes follow, in that order."""

    name: str
    beginning: bytes
    tensors: tuple[str, ...] = ()
    data: int = 0


def _layout(specs: Mapping[str, TensorSpec], header: Header, shard_bytes: int) -> list[_File]:
    """All that is written, but for the bytes of the tensors: the weight files, and their index if they are several."""
    text = json.dumps(header.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), allow_nan=False)
    about = {"format": "pt", HEADER_KEY: text, HEADER_SUM_KEY: hashlib.sha256(text.encode()).hexdigest()}
    shards = _shards(specs, shard_bytes)
    if len(shards) == 1:
        return [_safetensors(WEIGHTS_FILE, shards[0], about)]
    files: list[_File] = []
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        files.append(_safetensors(name, shard, about if number == 1 else {"format": "pt"}))
        weight_map |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": sum(_bytes(*spec) for spec in specs.values())}, "weight_map": weight_map}
    return [*files, _File(INDEX_FILE, (json.dumps(index, indent=1, allow_nan=False) + "\n").encode())]


def _shards(specs: Mapping[str, TensorSpec], shard_bytes: int) -> list[dict[str, TensorSpec]]:
    """The tensors by name, cut where a shard would become larger than allowed."""
    shards: list[dict[str, TensorSpec]] = [{}]
    size = 0
    for name in sorted(specs):
        if shards[-1] and size + _bytes(*specs[name]) > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = specs[name]
        size += _bytes(*specs[name])
    return shards


def _safetensors(name: str, specs: Mapping[str, TensorSpec], about: Mapping[str, str]) -> _File:
    """One safetensors file. (The library's writer orders metadata by chance, so equal runs would differ.)"""
    # Wide dtypes come first: then each tensor begins on a multiple of its item size.
    names = sorted(specs, key=lambda each: (-DTYPES[specs[each][0]].itemsize, each))
    entries: dict[str, Any] = {"__metadata__": dict(about)}
    offset = 0
    for each in names:
        dtype, shape = specs[each]
        end = offset + _bytes(dtype, shape)
        entries[each] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return _File(name, struct.pack("<Q", len(text)) + text, tuple(names), offset)


def _fill(file: _File, tensors: Mapping[str, Tensor], path: Path) -> None:
    with path.open("wb") as opened:
        opened.write(file.beginning)
        for name in file.tensors:
            opened.write(formats.tensor_bytes(tensors[name]))


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(formats.tensor_bytes(tensor)).hexdigest()


# Reading ----------------------------------------------------------------------------------------------------------


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
        index = _read_index(folder)
        names = [WEIGHTS_FILE] if index is None else sorted(set(index.values()))
        files = {name: _open_file(folder / name) for name in names}
        where: dict[str, str] = {}
        for file, opened in files.items():
            for tensor in opened.keys():  # noqa: SIM118 (a safetensors file cannot be iterated over)
                if tensor in where:
                    raise _damaged(folder / file, f"it holds {tensor}, which {where[tensor]} holds too")
                where[tensor] = file
        if index is not None and index != where:
            name = min(name for name in index.keys() | where.keys() if index.get(name) != where.get(name))
            raise _damaged(folder / INDEX_FILE, f"it and the weight files disagree about where {name} is")
        model = cls(folder, _read_header(folder / names[0], files[names[0]]), files, where)
        model._check_tensors()
        return model

    def matrix(self, name: str) -> PackedMatrix:
        """Read one quantized matrix, checking its checksums, codes, scales and digest.

        Raises:
            UserError: something about it is wrong.
            ValueError: there is no matrix of that name.
        """
        if name not in self.header.matrices:
            raise ValueError(f"the packed model has no matrix called {name}")
        entry = self.header.matrices[name]
        parts = {part: self._tensor(part_name(name, part), sha) for part, sha in entry.sha256.items()}
        try:
            encoded, spec = formats.unpack_matrix(parts, entry.formats, entry.group_size, entry.shape)
        except ValueError as error:
            raise self._broken(part_name(name, SCALES), name, str(error)) from None
        if formats.digest(encoded, spec) != entry.digest:
            raise self._broken(part_name(name, SCALES), name, "its codes and scales do not have the recorded digest")
        return PackedMatrix(name, entry.kind, encoded, spec)

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
                raise self._broken(name, name, "it is not a positive float32 number")
            found[name] = float(scale)
        return found

    def verify(self) -> None:
        """Read and check everything once.

        Raises:
            UserError: something is damaged.
        """
        for name in self.header.matrices:
            self.matrix(name)
        self.others()

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

    def _tensor(self, name: str, sha256: str) -> Tensor:
        tensor: Tensor = self._files[self._where[name]].get_tensor(name)
        if _sha256(tensor) != sha256:
            raise self._broken(name, name, "its bytes do not have the recorded checksum")
        return tensor

    def _broken(self, tensor: str, name: str, reason: str) -> UserError:
        return _damaged(self.folder / self._where[tensor], f"{name}: {reason}")

    def _check_tensors(self) -> None:
        """Names, dtypes and shapes of the stored tensors are those that the header describes."""
        stored = self.tensor_shapes()
        expected = {name: (entry.dtype, entry.shape) for name, entry in self.header.others.items()}
        for name, entry in self.header.matrices.items():
            expected |= _expected_parts(name, entry, stored)
        first = self.folder / min(self._files)
        for name in sorted(expected.keys() - stored.keys()):
            raise _damaged(first, f"the tensor {name} is missing")
        for name in sorted(stored.keys() - expected.keys()):
            raise _damaged(self.folder / self._where[name], f"the tensor {name} does not belong to it")
        for name, (dtype, shape) in expected.items():
            if stored[name] != (dtype, shape):
                found = f"{stored[name][0]} {list(stored[name][1])}"
                raise self._broken(name, name, f"it should be {dtype} {list(shape)}, but is {found}")
        for name, entry in self.header.matrices.items():
            rows = {part: stored[part_name(name, part)][1][0] for part in _code_parts(entry)}
            for kind, wanted in _code_rows(entry).items():
                together = sum(count for part, count in rows.items() if part.endswith(TAIL) == (kind == "tails"))
                if together != wanted:
                    reason = f"its formats have {together} {kind} together, but it has {wanted}"
                    raise self._broken(part_name(name, SCALES), name, reason)


def _code_parts(entry: MatrixEntry) -> list[str]:
    return [part for part in entry.sha256 if part not in (SCALES, ROW_FORMATS, BLOCK_FORMATS)]


def _code_rows(entry: MatrixEntry) -> dict[str, int]:
    """How many rows the parts of codes have together: rows of the matrix, or its groups and tails."""
    rows, cols = entry.shape
    if BLOCK_FORMATS not in entry.sha256:
        return {"rows": rows}
    group = min(entry.group_size, cols)
    return {"groups": rows * (cols // group), "tails": rows if cols % group else 0}


def _code_columns(entry: MatrixEntry, part: str) -> int:
    """Codes in a row of a part: those of a row of the matrix, or of a group."""
    cols = entry.shape[1]
    if BLOCK_FORMATS not in entry.sha256:
        return cols
    group = min(entry.group_size, cols)
    return cols % group if part.endswith(TAIL) else group


def _format_of(part: str) -> formats.Format:
    return formats.get(part.removesuffix(TAIL))


def _expected_parts(name: str, entry: MatrixEntry, stored: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """Dtype and shape of each part of a matrix. How many rows have a format is known only from the rows themselves."""
    rows, cols = entry.shape
    groups = formats.group_count(cols, entry.group_size)
    shapes: dict[str, tuple[int, ...]] = {}
    for part in _code_parts(entry):
        found = stored.get(part_name(name, part), ("", ()))[1]
        shapes[part] = (found[0] if found else rows, _format_of(part).packed_columns(_code_columns(entry, part)))
    alike = stored.get(part_name(name, BLOCK_FORMATS), ("", ()))[1][:1] == (1,)
    shapes |= {SCALES: (rows, groups), ROW_FORMATS: (rows,)}
    shapes[BLOCK_FORMATS] = (1 if alike else rows, formats.index_columns(groups, len(entry.formats)))
    dtypes = dict.fromkeys(shapes, "U8") | {SCALES: "F16"}
    return {part_name(name, part): (dtypes[part], shapes[part]) for part in shapes if part in entry.sha256}


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is damaged or no packed model: {reason}.", "Make it again with `edgerazor pack`.")


def _read_index(folder: Path) -> dict[str, str] | None:
    """Tensor name -> file name of a sharded folder; None where there is one weight file."""
    path = folder / INDEX_FILE
    if (folder / WEIGHTS_FILE).is_file():
        return None
    if not path.is_file():
        raise UserError(f"There is no packed model in {folder}: {WEIGHTS_FILE} is missing.", "Run `edgerazor pack`.")
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        entries = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise _damaged(path, "it is not an index of safetensors files") from None
    for file in entries.values():
        if not SHARD_NAME.fullmatch(file):
            raise _damaged(path, f"{file!r} is not the name of a weight file")
    if not entries:
        raise _damaged(path, "it names no files")
    return entries


def _open_file(path: Path) -> Any:
    if not path.is_file():
        raise _damaged(path, "the file is missing")
    try:
        return safe_open(path, framework="pt")
    except Exception as error:  # the library raises its own, the system's and decoding errors
        reason = " ".join(str(error).split())
        raise _damaged(path, f"it is cut off or not a safetensors file ({reason})") from None


def _read_header(path: Path, file: Any) -> Header:
    about = file.metadata() or {}
    text = about.get(HEADER_KEY)
    if text is None:
        raise _damaged(path, f"it has no {HEADER_KEY} header")
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError):
        raise _damaged(path, "its header is not JSON") from None
    version = raw.get("version") if isinstance(raw, dict) else None
    if hashlib.sha256(text.encode()).hexdigest() != about.get(HEADER_SUM_KEY):
        raise _damaged(path, "its header does not have the recorded checksum")
    if isinstance(version, int) and version != VERSION:
        raise UserError(
            f"{path} has version {version} of the packed format, but this program reads version {VERSION}.",
            "Pack the model again with this program, or use the one that packed it.",
        )
    try:
        header = Header.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(step) for step in first["loc"])
        raise _damaged(path, f"its header is wrong at {place or 'the top'} ({first['msg']})") from None
    problem = _header_problem(header)
    if problem:
        raise _damaged(path, problem)
    return header


def _header_problem(header: Header) -> str:
    """What makes a header contradict itself, or an empty string."""
    for name, entry in header.matrices.items():
        if problem := _matrix_problem(entry):
            return f"{name}: {problem}"
    if all(entry.kind != "linear" for entry in header.matrices.values()):
        return "it has no quantized linear layer"
    for name, other in header.others.items():
        if other.dtype not in DTYPES:
            return f"{name} has the unknown dtype {other.dtype}"
    parts = {part_name(name, part) for name, entry in header.matrices.items() for part in entry.sha256}
    for name in sorted(parts & header.others.keys()):
        return f"{name} is both a part of a matrix and a tensor of its own"
    for name, target in header.tied.items():
        if target not in header.matrices or name in header.matrices:
            return f"{name} is tied to {target}, but only a matrix can be shared, by a module that has none"
    return ""


def _matrix_problem(entry: MatrixEntry) -> str:
    known = formats.names()
    unknown = [name for name in entry.formats if name not in known]
    if unknown:
        return f"it has the unknown format {unknown[0]}"
    choices = {ROW_FORMATS, BLOCK_FORMATS} & set(entry.sha256)
    if len(set(entry.formats)) < len(entry.formats) or (len(entry.formats) > 1 and len(choices) != 1):
        return "its list of formats repeats one, or does not say which row has which"
    if min(entry.shape) < 1:
        return f"it has the impossible shape {list(entry.shape)}"
    tails = {f"{name}{TAIL}" for name in entry.formats} if BLOCK_FORMATS in choices else set()
    foreign = set(entry.sha256) - {*entry.formats, *tails, SCALES, ROW_FORMATS, BLOCK_FORMATS}
    if len(choices) > 1 or foreign or SCALES not in entry.sha256 or not _code_parts(entry):
        return "its parts are not those of a matrix"
    return ""


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
        matrix = model.matrix(name)
        if formats.digest(matrix.encoded, matrix.spec) != expected:
            raise UserError(
                f"The packed matrix {name} does not hold the codes and scales that training computed with.",
                "Run `edgerazor pack --force`; if that does not help, this is a bug worth reporting.",
            )


# Sizes ------------------------------------------------------------------------------------------------------------


class ClassSize(BaseModel):
    """Size of one class of tensors."""

    model_config = ConfigDict(extra="forbid")

    kind: TensorClass
    weights: int = Field(description="number of weights")
    nominal_bits: float = Field(description="bits a weight by the formats' names")
    bytes: int = Field(description="bytes of tensor data, scales and padding included")
    real_bits: float = Field(description="8 * bytes / weights")


class SizeTable(BaseModel):
    """Size of a packed model. Weights that modules share are counted once."""

    model_config = ConfigDict(extra="forbid")

    classes: list[ClassSize]
    parameters: int = Field(description="number of all weights")
    bytes: int = Field(description="bytes of the weight files, their headers and index included")
    nominal_bits: float = Field(description="bits a weight of the linear layers by the formats' names")
    real_bits: float = Field(description="8 * bytes / parameters")


def size_table(model: PackedModel) -> SizeTable:
    """Sizes by class of tensors (those that the model has) and altogether; reads no tensor."""
    classes = []
    for kind in get_args(TensorClass):
        sizes = list(_sizes(model, kind))
        weights = sum(each[0] for each in sizes)
        if weights:
            bits, size = sum(each[1] for each in sizes), sum(each[2] for each in sizes)
            classes.append(
                ClassSize(
                    kind=kind, weights=weights, nominal_bits=bits / weights, bytes=size, real_bits=8 * size / weights
                )
            )
    parameters = sum(each.weights for each in classes)
    files = model.files()
    if len(files) > 1:
        files.append(model.folder / INDEX_FILE)
    size = sum(file.stat().st_size for file in files)
    return SizeTable(
        classes=classes,
        parameters=parameters,
        bytes=size,
        nominal_bits=next(each.nominal_bits for each in classes if each.kind == "linear"),
        real_bits=8 * size / parameters,
    )


def _sizes(model: PackedModel, kind: TensorClass) -> Iterator[tuple[int, float, int]]:
    """(weights, weights times nominal bits, bytes) of each matrix or tensor of a class."""
    if kind == "other":
        for entry in model.header.others.values():
            count, itemsize = math.prod(entry.shape), DTYPES[entry.dtype].itemsize
            yield count, 8.0 * itemsize * count, itemsize * count
        return
    stored = model.tensor_shapes()
    for name, matrix in model.header.matrices.items():
        if matrix.kind == kind:
            bits = 0.0
            for part in _code_parts(matrix):
                weights = stored[part_name(name, part)][1][0] * _code_columns(matrix, part)
                bits += _format_of(part).nominal_bits * weights
            yield math.prod(matrix.shape), bits, sum(_bytes(*stored[part_name(name, part)]) for part in matrix.sha256)


def _bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return DTYPES[dtype].itemsize * math.prod(shape)
